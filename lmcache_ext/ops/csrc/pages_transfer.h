// Page copies as a device does them, in plain C++: what one launch is told, and what one lane of one warp does with it.
//
// No CUDA and no torch header is needed, so the tests run every lane of every warp on the host and hold the result
// against the plain twin; `pages.cu` adds the launch. A page is cut into pieces of 4 KiB; a piece is a warp's work:
//
//     block 0: | t0: piece 0 | piece 1 | t1: piece 2 | piece 3 |   block 1: | piece 4 | ...
//
// Everything a launch needs to know travels in its parameters (16 KiB; compute capability 7.0 and CUDA 12.1 take 32), so
// nothing is copied ahead of it and nothing waits.

#pragma once

#include <cstdint>

#include "device.h"
#include "pages.h"

namespace kvx {

constexpr int kMaxTensors = 128;       // of one launch; more take more launches
constexpr int kMaxBlocks = 1024;       // likewise
constexpr int64_t kPieceBytes = 4096;  // a warp has 8 vectors of each lane on their way
constexpr int kWarp = 32;
constexpr int kVectorsInFlight = 8;

struct alignas(16) Vector {
  uint32_t words[4];
};

struct Transfer {
  uint8_t* rows;
  int32_t num_tensors;
  int32_t num_blocks;
  uint8_t* base[kMaxTensors];
  int64_t stride[kMaxTensors];
  int64_t in_row[kMaxTensors];        // where a tensor's page begins within a block's part of a row
  int64_t page_bytes[kMaxTensors];
  int64_t first_piece[kMaxTensors + 1];
  int32_t block_ids[kMaxBlocks];
  int64_t row_offsets[kMaxBlocks];
};

static_assert(sizeof(Transfer) <= 32764, "fits the parameters of a kernel");

enum class Way { kGather, kScatter };

KVX_DEVICE Vector read_once(const Vector* from) {
#if defined(__CUDA_ARCH__)
  const uint4 x = __ldcs(reinterpret_cast<const uint4*>(from));  // not read again: leave the caches alone
  return {{x.x, x.y, x.z, x.w}};
#else
  return *from;
#endif
}

KVX_DEVICE void write_once(Vector* to, const Vector& value) {
#if defined(__CUDA_ARCH__)
  __stcs(reinterpret_cast<uint4*>(to), make_uint4(value.words[0], value.words[1], value.words[2], value.words[3]));
#else
  *to = value;
#endif
}

// The tensor whose pieces [first_piece[j], first_piece[j + 1]) hold `piece`.
KVX_DEVICE int32_t tensor_of(const Transfer& transfer, int64_t piece) {
  int32_t low = 0, high = transfer.num_tensors;
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    if (transfer.first_piece[middle] <= piece) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

KVX_DEVICE int64_t num_pieces(const Transfer& transfer) {
  return transfer.num_blocks * transfer.first_piece[transfer.num_tensors];
}

// One lane's part of a piece: vectors lane, lane + 32, ...; up to kVectorsInFlight are read before one is written.
template <Way way>
KVX_DEVICE void copy_piece(const Transfer& transfer, int64_t piece, int lane) {
  const int64_t per_block = transfer.first_piece[transfer.num_tensors];
  const int64_t block = piece / per_block, in_block = piece % per_block;
  const int32_t j = tensor_of(transfer, in_block);
  const int64_t begin = (in_block - transfer.first_piece[j]) * kPieceBytes;
  const int64_t left = transfer.page_bytes[j] - begin;
  const auto vectors = static_cast<int32_t>((left < kPieceBytes ? left : kPieceBytes) / sizeof(Vector));
  uint8_t* page = transfer.base[j] + transfer.block_ids[block] * transfer.stride[j] + begin;
  uint8_t* part = transfer.rows + transfer.row_offsets[block] + transfer.in_row[j] + begin;
  const auto* from = reinterpret_cast<const Vector*>(way == Way::kGather ? page : part);
  auto* to = reinterpret_cast<Vector*>(way == Way::kGather ? part : page);
  Vector held[kVectorsInFlight];
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int i = 0; i < kVectorsInFlight; ++i) {
    if (lane + i * kWarp < vectors) held[i] = read_once(from + lane + i * kWarp);
  }
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int i = 0; i < kVectorsInFlight; ++i) {
    if (lane + i * kWarp < vectors) write_once(to + lane + i * kWarp, held[i]);
  }
}

static_assert(kPieceBytes == kWarp * kVectorsInFlight * sizeof(Vector), "one round of a warp is a piece");

// Refusals beside those of first_violation, which are no less than -(1 + num_blocks + num_tensors).
constexpr int64_t kUnaligned = INT64_MIN;       // an address, a stride, a page or an offset is no multiple of 16
constexpr int64_t kLaunchFailed = INT64_MIN + 1;  // plus the driver's error code

inline bool is_aligned(const kvx_tensor* tensors, int32_t num_tensors, const int64_t* row_offsets, int64_t num_blocks,
                       const uint8_t* rows) {
  uint64_t bits = reinterpret_cast<uintptr_t>(rows);
  for (int32_t j = 0; j < num_tensors; ++j) {
    bits |= reinterpret_cast<uintptr_t>(tensors[j].base) | static_cast<uint64_t>(tensors[j].page_bytes);
    bits |= tensors[j].num_blocks > 1 ? static_cast<uint64_t>(tensors[j].block_stride) : 0;
  }
  for (int64_t i = 0; i < num_blocks; ++i) bits |= static_cast<uint64_t>(row_offsets[i]);
  return bits % sizeof(Vector) == 0;
}

// How pages that lie in rows as they are become warps' work. Another cut of pages has these two as well.
struct AsTheyAre {
  int64_t row_bytes(int64_t page_bytes) const { return page_bytes; }
  int64_t pieces(int64_t page_bytes) const { return (page_bytes + kPieceBytes - 1) / kPieceBytes; }
};

// Returns where the next tensor's page begins within a block's part of a row.
template <typename Cut>
int64_t set_tensors(const kvx_tensor* tensors, int32_t count, int64_t in_row, const Cut& cut, Transfer* transfer) {
  transfer->num_tensors = count;
  transfer->first_piece[0] = 0;
  for (int32_t j = 0; j < count; ++j) {
    transfer->base[j] = tensors[j].base;
    transfer->stride[j] = tensors[j].block_stride;
    transfer->page_bytes[j] = tensors[j].page_bytes;
    transfer->in_row[j] = in_row;
    in_row += cut.row_bytes(tensors[j].page_bytes);
    transfer->first_piece[j + 1] = transfer->first_piece[j] + cut.pieces(tensors[j].page_bytes);
  }
  return in_row;
}

// Hands each launch's Transfer, of arguments that were checked, to `launch`, which returns 0 or an error code. Returns
// bytes of rows, or kLaunchFailed and more.
template <typename Cut, typename Launch>
int64_t in_launches(const kvx_tensor* tensors, int32_t num_tensors, const int64_t* block_ids,
                    const int64_t* row_offsets, int64_t num_blocks, uint8_t* rows, const Cut& cut, Transfer* transfer,
                    const Launch& launch) {
  transfer->rows = rows;
  int64_t in_row = 0;
  for (int32_t first = 0; first < num_tensors; first += kMaxTensors) {
    const int32_t count = num_tensors - first < kMaxTensors ? num_tensors - first : kMaxTensors;
    in_row = set_tensors(tensors + first, count, in_row, cut, transfer);
    for (int64_t begin = 0; begin < num_blocks; begin += kMaxBlocks) {
      const int64_t left = num_blocks - begin;
      transfer->num_blocks = static_cast<int32_t>(left < kMaxBlocks ? left : kMaxBlocks);
      for (int32_t i = 0; i < transfer->num_blocks; ++i) {
        transfer->block_ids[i] = static_cast<int32_t>(block_ids[begin + i]);
        transfer->row_offsets[i] = row_offsets[begin + i];
      }
      const int64_t error = launch(*transfer);
      if (error != 0) return kLaunchFailed + error;
    }
  }
  return num_blocks * in_row;
}

// Checks everything, then launches. Returns bytes copied or a refusal.
template <typename Launch>
int64_t transfer_pages(const kvx_tensor* tensors, int32_t num_tensors, const int64_t* block_ids,
                       const int64_t* row_offsets, int64_t num_blocks, uint8_t* rows, int64_t rows_bytes,
                       Transfer* transfer, const Launch& launch) {
  const int64_t violation = first_violation(tensors, num_tensors, block_ids, row_offsets, num_blocks, rows_bytes);
  if (violation != 0) return violation;
  if (!is_aligned(tensors, num_tensors, row_offsets, num_blocks, rows)) return kUnaligned;
  return in_launches(tensors, num_tensors, block_ids, row_offsets, num_blocks, rows, AsTheyAre(), transfer, launch);
}

}  // namespace kvx
