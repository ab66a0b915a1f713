// Where pages lie, and whether a copy of them stays inside its buffers: shared by the copiers for hosts and for CUDA.

#pragma once

#include <cstdint>

struct kvx_tensor {
  uint8_t* base;         // first byte of block 0
  int64_t num_blocks;    // blocks in this tensor
  int64_t block_stride;  // bytes from one block to the next
  int64_t page_bytes;    // bytes of one block that belong to the page
};

static_assert(sizeof(kvx_tensor) == 32, "ops/table.py passes rows of four int64");

namespace kvx {

inline bool tensor_is_sound(const kvx_tensor& t) {
  int64_t end = 0;
  return t.num_blocks > 0 && t.block_stride >= 0 && t.page_bytes > 0 &&
         (t.page_bytes <= t.block_stride || t.num_blocks == 1) &&
         !__builtin_mul_overflow(t.num_blocks, t.block_stride, &end);
}

// 0 if every copy stays inside its buffers; otherwise -(1 + i) for the first bad
// block i, or -(1 + num_blocks + j) for the first bad tensor j. `row_bytes_of` says how
// many bytes of a row a page of so many bytes takes, 0 if there can be no such page.
template <typename RowBytes>
int64_t first_violation(const kvx_tensor* tensors, int32_t num_tensors, const int64_t* block_ids,
                        const int64_t* row_offsets, int64_t num_blocks, int64_t rows_bytes,
                        const RowBytes& row_bytes_of) {
  int64_t fewest_blocks = INT64_MAX;
  int64_t block_bytes = 0;
  for (int32_t j = 0; j < num_tensors; ++j) {
    const int64_t part_bytes = tensor_is_sound(tensors[j]) ? row_bytes_of(tensors[j].page_bytes) : 0;
    if (part_bytes <= 0 || __builtin_add_overflow(block_bytes, part_bytes, &block_bytes)) {
      return -(1 + num_blocks + j);
    }
    if (tensors[j].num_blocks < fewest_blocks) fewest_blocks = tensors[j].num_blocks;
  }
  for (int64_t i = 0; i < num_blocks; ++i) {
    const bool inside = block_ids[i] >= 0 && block_ids[i] < fewest_blocks && row_offsets[i] >= 0 &&
                        row_offsets[i] <= rows_bytes - block_bytes;
    if (!inside) return -(1 + i);
  }
  return 0;
}

// The same for pages that lie in rows as they are.
inline int64_t first_violation(const kvx_tensor* tensors, int32_t num_tensors, const int64_t* block_ids,
                               const int64_t* row_offsets, int64_t num_blocks, int64_t rows_bytes) {
  return first_violation(tensors, num_tensors, block_ids, row_offsets, num_blocks, rows_bytes,
                         [](int64_t page_bytes) { return page_bytes; });
}

}  // namespace kvx
