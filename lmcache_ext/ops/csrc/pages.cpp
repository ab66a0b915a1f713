// Copies KV pages between vLLM's paged tensors and rows of host memory.
//
// A block is one page in each tensor; in a row its pages lie side by side:
//
//     tensors[0] | page 0 | page 1 | page 2 | ...        row:  ... | t0 | t1 | t2 | ...
//     tensors[1] | page 0 | page 1 | page 2 | ...                  ^ row_offsets[i]
//     tensors[2] | page 0 | page 1 | page 2 | ...                    pages of block_ids[i]
//
// Plain C interface, no state, no allocation: any number of threads may copy at
// once as long as they write to different bytes. Everything is checked before the
// first byte moves, so a refused call has copied nothing.

#include <cstdint>

#include "pages.h"
#include "stream.h"

#define KVX_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using kvx::copy_run;
using kvx::first_violation;
using kvx::publish;

enum class Direction { kGather, kScatter };

// One run of bytes that is contiguous on both sides; neighbours are joined into it.
struct Run {
  uint8_t* to = nullptr;
  const uint8_t* from = nullptr;
  int64_t bytes = 0;

  void flush() const {
    if (bytes > 0) copy_run(to, from, bytes);
  }

  void append(uint8_t* next_to, const uint8_t* next_from, int64_t next_bytes) {
    if (next_to == to + bytes && next_from == from + bytes) {
      bytes += next_bytes;
      return;
    }
    flush();
    *this = Run{next_to, next_from, next_bytes};
  }
};

template <Direction direction>
int64_t copy_pages(const kvx_tensor* tensors, int32_t num_tensors, const int64_t* block_ids,
                   const int64_t* row_offsets, int64_t num_blocks, uint8_t* rows,
                   int64_t rows_bytes) {
  const int64_t violation =
      first_violation(tensors, num_tensors, block_ids, row_offsets, num_blocks, rows_bytes);
  if (violation != 0) return violation;
  Run run;
  int64_t copied_bytes = 0;
  for (int64_t i = 0; i < num_blocks; ++i) {
    uint8_t* in_row = rows + row_offsets[i];
    for (int32_t j = 0; j < num_tensors; ++j) {
      uint8_t* page = tensors[j].base + block_ids[i] * tensors[j].block_stride;
      const int64_t page_bytes = tensors[j].page_bytes;
      if constexpr (direction == Direction::kGather) {
        run.append(in_row, page, page_bytes);
      } else {
        run.append(page, in_row, page_bytes);
      }
      in_row += page_bytes;
      copied_bytes += page_bytes;
    }
  }
  run.flush();
  publish();
  return copied_bytes;
}

}  // namespace

// Raised with every change of the interface below; ops/pages.py refuses another.
KVX_EXPORT int32_t kvx_abi() { return 1; }

// Pages -> rows. Returns bytes copied, or what first_violation says.
KVX_EXPORT int64_t kvx_gather_pages(const kvx_tensor* tensors, int32_t num_tensors,
                                    const int64_t* block_ids, const int64_t* row_offsets,
                                    int64_t num_blocks, uint8_t* rows, int64_t rows_bytes) {
  return copy_pages<Direction::kGather>(tensors, num_tensors, block_ids, row_offsets, num_blocks,
                                        rows, rows_bytes);
}

// Rows -> pages; `rows` is only read. Returns as kvx_gather_pages does.
KVX_EXPORT int64_t kvx_scatter_pages(const kvx_tensor* tensors, int32_t num_tensors,
                                     const int64_t* block_ids, const int64_t* row_offsets,
                                     int64_t num_blocks, uint8_t* rows, int64_t rows_bytes) {
  return copy_pages<Direction::kScatter>(tensors, num_tensors, block_ids, row_offsets, num_blocks,
                                         rows, rows_bytes);
}
