// Copies KV pages between vLLM's paged tensors and rows of host memory that hold a byte for each element.
//
// As pages.cpp, but that a page is quantised on its way into the row and restored on its way back; pages_fp8.h says what
// lies where. Plain C interface, no state, no allocation: any number of threads may copy at once as long as they write
// to different bytes. Everything is checked before the first byte moves, so a refused call has copied nothing.
// Build without contraction of multiplications and additions: results are compared bit for bit.

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <initializer_list>

#include "pages_fp8.h"
#include "stream.h"

#define KVX_EXPORT extern "C" __attribute__((visibility("default")))

#if defined(__x86_64__)
#define KVX_INLINE inline __attribute__((always_inline))
#define KVX_AVX2 __attribute__((target("avx2,f16c")))
#define KVX_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c")))
#else
#define KVX_INLINE inline
#endif

namespace {

using namespace kvx;

// ---- runs of elements; plain loops, of which the compiler makes vectors of each width below

template <Dtype dtype>
KVX_INLINE uint32_t most_of(const uint8_t* from, int64_t count) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = magnitude_bits<dtype>(from + i * kElementBytes<dtype>);
    most = bits > most ? bits : most;
  }
  return most;
}

template <Dtype dtype>
KVX_INLINE void encode(const uint8_t* from, int64_t count, float inverse, uint8_t* codes) {
  for (int64_t i = 0; i < count; ++i) {
    codes[i] = to_e4m3(read_element<dtype>(from + i * kElementBytes<dtype>) * inverse);
  }
}

template <Dtype dtype>
KVX_INLINE void decode(const uint8_t* codes, int64_t count, float scale, uint8_t* to) {
  for (int64_t i = 0; i < count; ++i) {
    write_element<dtype>(to + i * kElementBytes<dtype>, tame(from_e4m3(codes[i]) * scale));
  }
}

struct Loops {
  uint32_t (*most_of)(const uint8_t*, int64_t);
  void (*encode)(const uint8_t*, int64_t, float, uint8_t*);
  void (*decode)(const uint8_t*, int64_t, float, uint8_t*);
};

#define KVX_LOOPS(name, target)                                                             \
  template <Dtype dtype>                                                                    \
  struct name {                                                                             \
    target static uint32_t most(const uint8_t* from, int64_t count) {                       \
      return most_of<dtype>(from, count);                                                   \
    }                                                                                       \
    target static void into(const uint8_t* from, int64_t count, float inverse, uint8_t* codes) { \
      encode<dtype>(from, count, inverse, codes);                                           \
    }                                                                                       \
    target static void back(const uint8_t* codes, int64_t count, float scale, uint8_t* to) { \
      decode<dtype>(codes, count, scale, to);                                               \
    }                                                                                       \
    static constexpr Loops loops = {most, into, back};                                      \
  };

KVX_LOOPS(Plain, )
#if defined(__x86_64__)
KVX_LOOPS(Avx2, KVX_AVX2)
KVX_LOOPS(Avx512, KVX_AVX512)
#endif

#if defined(__x86_64__)
bool has_f16c() {  // clang 14 does not know it by name
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

template <Dtype dtype>
const Loops& fastest_loops() {
#if defined(__x86_64__)
  const bool f16c = has_f16c();
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (f16c && wide) return Avx512<dtype>::loops;
  if (f16c && __builtin_cpu_supports("avx2")) return Avx2<dtype>::loops;
#endif
  return Plain<dtype>::loops;
}

// ---- one head's keys or values

constexpr int64_t kHeld = 4096;  // elements that are on their way in the first-level cache; enough bytes to stream

enum class Direction { kGather, kScatter };

// A head's keys (or values): `runs` runs of `count` elements, at these places of the page and of its codes.
struct Plane {
  uint8_t* elements;
  uint8_t* codes;
  uint8_t* scale;
  int64_t runs;
  int64_t run_stride;
  int64_t count;
};

template <Dtype dtype>
void gather_plane(const Loops& loops, const Plane& plane) {
  uint32_t most = 0;
  for (int64_t run = 0; run < plane.runs; ++run) {
    const uint32_t found = loops.most_of(plane.elements + run * plane.run_stride * kElementBytes<dtype>, plane.count);
    most = found > most ? found : most;
  }
  const float scale = e4m3_scale(magnitude<dtype>(most)), inverse = e4m3_inverse(scale);
  store(plane.scale, scale);
  alignas(64) uint8_t held[kHeld];
  for (int64_t run = 0; run < plane.runs; ++run) {
    const uint8_t* from = plane.elements + run * plane.run_stride * kElementBytes<dtype>;
    uint8_t* to = plane.codes + run * plane.run_stride;
    for (int64_t at = 0; at < plane.count; at += kHeld) {
      const int64_t count = plane.count - at < kHeld ? plane.count - at : kHeld;
      loops.encode(from + at * kElementBytes<dtype>, count, inverse, held);
      copy_run(to + at, held, count);
    }
  }
}

template <Dtype dtype>
void scatter_plane(const Loops& loops, const Plane& plane) {
  const float scale = tame(load<float>(plane.scale));
  alignas(64) uint8_t held[kHeld * kElementBytes<dtype>];
  for (int64_t run = 0; run < plane.runs; ++run) {
    const uint8_t* from = plane.codes + run * plane.run_stride;
    uint8_t* to = plane.elements + run * plane.run_stride * kElementBytes<dtype>;
    for (int64_t at = 0; at < plane.count; at += kHeld) {
      const int64_t count = plane.count - at < kHeld ? plane.count - at : kHeld;
      loops.decode(from + at, count, scale, held);
      copy_run(to + at * kElementBytes<dtype>, held, count * kElementBytes<dtype>);
    }
  }
}

// ---- pages

void clear(uint8_t* from, uint8_t* to) { std::memset(from, 0, static_cast<size_t>(to - from)); }

template <Direction direction, Dtype dtype>
void copy_page(const Loops& loops, const kvx_page_shape& shape, const PageSizes& sizes, uint8_t* page, uint8_t* part) {
  uint8_t* codes = part + sizes.scale_bytes;
  for (int64_t head = 0; head < shape.heads; ++head) {
    for (const bool keys : {true, false}) {
      const int64_t first = head * sizes.head_stride + (keys ? 0 : shape.k_run);
      uint8_t* scale = part + (head * 2 + (keys ? 0 : 1)) * static_cast<int64_t>(sizeof(float));
      const Plane plane = {page + first * kElementBytes<dtype>, codes + first,    scale, shape.runs,
                           sizes.run_stride,                    keys ? shape.k_run : shape.v_run};
      if constexpr (direction == Direction::kGather) {
        gather_plane<dtype>(loops, plane);
      } else {
        scatter_plane<dtype>(loops, plane);
      }
    }
  }
  if constexpr (direction == Direction::kGather) {  // what is stored must not hold a stranger's bytes
    clear(part + shape.heads * 2 * static_cast<int64_t>(sizeof(float)), codes);
    clear(codes + sizes.elements, part + sizes.part_bytes);
  }
}

template <Direction direction, Dtype dtype>
int64_t copy_pages(const kvx_page_shape& shape, const kvx_tensor* tensors, int32_t num_tensors,
                   const int64_t* block_ids, const int64_t* row_offsets, int64_t num_blocks, uint8_t* rows,
                   int64_t rows_bytes) {
  const PageSizes sizes = sizes_of(shape);
  const int64_t violation =
      first_violation(tensors, num_tensors, block_ids, row_offsets, num_blocks, rows_bytes,
                      [&](int64_t page_bytes) { return part_bytes_of(sizes, page_bytes); });
  if (violation != 0) return violation;
  static const Loops& loops = fastest_loops<dtype>();
  int64_t copied_bytes = 0;
  for (int64_t i = 0; i < num_blocks; ++i) {
    uint8_t* part = rows + row_offsets[i];
    for (int32_t j = 0; j < num_tensors; ++j) {
      uint8_t* page = tensors[j].base + block_ids[i] * tensors[j].block_stride;
      uint8_t* const end = page + tensors[j].page_bytes;
      for (; page < end; page += sizes.page_bytes, part += sizes.part_bytes) {
        copy_page<direction, dtype>(loops, shape, sizes, page, part);
        copied_bytes += sizes.part_bytes;
      }
    }
  }
  publish();
  return copied_bytes;
}

template <Direction direction, typename... Arguments>
int64_t of_dtype(const kvx_page_shape& shape, Arguments... arguments) {
  if (shape.dtype == kFloat32) return copy_pages<direction, kFloat32>(shape, arguments...);
  if (shape.dtype == kFloat16) return copy_pages<direction, kFloat16>(shape, arguments...);
  return copy_pages<direction, kBfloat16>(shape, arguments...);
}

}  // namespace

// Raised with every change of the interface below; ops/pages_fp8.py refuses another.
KVX_EXPORT int32_t kvx_fp8_abi() { return 1; }

// Pages -> rows. Returns bytes of rows, or what first_violation says.
KVX_EXPORT int64_t kvx_fp8_gather_pages(const kvx_page_shape* shape, const kvx_tensor* tensors, int32_t num_tensors,
                                        const int64_t* block_ids, const int64_t* row_offsets, int64_t num_blocks,
                                        uint8_t* rows, int64_t rows_bytes) {
  return of_dtype<Direction::kGather>(*shape, tensors, num_tensors, block_ids, row_offsets, num_blocks, rows,
                                      rows_bytes);
}

// Rows -> pages; `rows` is only read. Returns as kvx_fp8_gather_pages does.
KVX_EXPORT int64_t kvx_fp8_scatter_pages(const kvx_page_shape* shape, const kvx_tensor* tensors, int32_t num_tensors,
                                         const int64_t* block_ids, const int64_t* row_offsets, int64_t num_blocks,
                                         uint8_t* rows, int64_t rows_bytes) {
  return of_dtype<Direction::kScatter>(*shape, tensors, num_tensors, block_ids, row_offsets, num_blocks, rows,
                                       rows_bytes);
}
