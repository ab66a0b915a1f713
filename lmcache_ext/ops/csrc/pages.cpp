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
#include <cstring>

#include "pages.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define KVX_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using kvx::first_violation;

constexpr int64_t kLineBytes = 64;
// 4 KiB: the smallest page measured, and streaming wins from there on in both
// directions (1.1x at 4 KiB, 1.7x from 128 KiB; EPYC Milan; benchmarks/copy_pages.py).
constexpr int64_t kStreamFromBytes = 4096;

enum class Direction { kGather, kScatter };

#if defined(__x86_64__)
// One aligned line at a time past the cache: a row is not read again soon, and a store that need
// not first fetch the line it overwrites leaves the memory bus to the copy. `bytes` is a multiple
// of a line.
void stream_lines(uint8_t* to, const uint8_t* from, int64_t bytes) {
  for (; bytes > 0; to += kLineBytes, from += kLineBytes, bytes -= kLineBytes) {
    const auto* source = reinterpret_cast<const __m128i*>(from);
    auto* target = reinterpret_cast<__m128i*>(to);
    const __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1);
    const __m128i c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
    _mm_stream_si128(target, a), _mm_stream_si128(target + 1, b);
    _mm_stream_si128(target + 2, c), _mm_stream_si128(target + 3, d);
  }
}

// The same, a line an instruction: 1.08 to 1.1x (Xeon with AVX-512; benchmarks/copy_pages.py).
__attribute__((target("avx512f"))) void stream_lines_avx512(uint8_t* to, const uint8_t* from, int64_t bytes) {
  for (; bytes > 0; to += kLineBytes, from += kLineBytes, bytes -= kLineBytes) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
  }
}

using StreamLines = void (*)(uint8_t*, const uint8_t*, int64_t);

StreamLines fastest_stream() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") ? stream_lines_avx512 : stream_lines;
}

void stream(uint8_t* to, const uint8_t* from, int64_t bytes) {
  static const StreamLines lines = fastest_stream();
  const auto head = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) % kLineBytes);
  const int64_t body = (bytes - head) / kLineBytes * kLineBytes;
  std::memcpy(to, from, static_cast<size_t>(head));
  lines(to + head, from + head, body);
  std::memcpy(to + head + body, from + head + body, static_cast<size_t>(bytes - head - body));
}

void copy_run(uint8_t* to, const uint8_t* from, int64_t bytes) {
  if (bytes < kStreamFromBytes) {
    std::memcpy(to, from, static_cast<size_t>(bytes));
    return;
  }
  stream(to, from, bytes);
}

// Streamed stores are weakly ordered: whoever learns that the copy is done must see it.
void publish() { _mm_sfence(); }
#else
void copy_run(uint8_t* to, const uint8_t* from, int64_t bytes) {
  std::memcpy(to, from, static_cast<size_t>(bytes));
}

void publish() {}
#endif

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
