// Runs of bytes on their way to memory that is not read again soon.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvx {

constexpr int64_t kLineBytes = 64;
// 4 KiB: the smallest page measured, and streaming wins from there on in both
// directions (1.1x at 4 KiB, 1.7x from 128 KiB; EPYC Milan; benchmarks/copy_pages.py).
constexpr int64_t kStreamFromBytes = 4096;

#if defined(__x86_64__)
// One aligned line at a time past the cache: a row is not read again soon, and a store that need
// not first fetch the line it overwrites leaves the memory bus to the copy. `bytes` is a multiple
// of a line.
inline void stream_lines(uint8_t* to, const uint8_t* from, int64_t bytes) {
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
__attribute__((target("avx512f"))) inline void stream_lines_avx512(uint8_t* to, const uint8_t* from, int64_t bytes) {
  for (; bytes > 0; to += kLineBytes, from += kLineBytes, bytes -= kLineBytes) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
  }
}

using StreamLines = void (*)(uint8_t*, const uint8_t*, int64_t);

inline StreamLines fastest_stream() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") ? stream_lines_avx512 : stream_lines;
}

inline void stream(uint8_t* to, const uint8_t* from, int64_t bytes) {
  static const StreamLines lines = fastest_stream();
  const auto head = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) % kLineBytes);
  const int64_t body = (bytes - head) / kLineBytes * kLineBytes;
  std::memcpy(to, from, static_cast<size_t>(head));
  lines(to + head, from + head, body);
  std::memcpy(to + head + body, from + head + body, static_cast<size_t>(bytes - head - body));
}

inline void copy_run(uint8_t* to, const uint8_t* from, int64_t bytes) {
  if (bytes < kStreamFromBytes) {
    std::memcpy(to, from, static_cast<size_t>(bytes));
    return;
  }
  stream(to, from, bytes);
}

// Streamed stores are weakly ordered: whoever learns that the copy is done must see it.
inline void publish() { _mm_sfence(); }
#else
inline void copy_run(uint8_t* to, const uint8_t* from, int64_t bytes) {
  std::memcpy(to, from, static_cast<size_t>(bytes));
}

inline void publish() {}
#endif

}  // namespace kvx
