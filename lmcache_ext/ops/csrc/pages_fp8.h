// Pages of keys and values as they lie in rows of eight bits: a scale for the keys and one for the values of each head,
// then a byte for each element, in the page's own order. serde/README.md has the format; ops/page_shape.py the twin.
//
// A page holds `heads` heads; a head has `runs` runs of `k_run` elements of keys and then `v_run` of values. On GPUs a
// run is a token. On CPU a head is one run: what an instruction set does to the order within keys or within values is
// of no concern here.
//
//     heads first    | h0: run 0, run 1, ... | h1: run 0, run 1, ... |          (LBHNC, BLHNC)
//     tokens first   | run 0 of h0, of h1, ... | run 1 of h0, of h1, ... |      (LBNHC, BLNHC)
//
// A tensor's page may be those of several layers, one after the other.

#pragma once

#include "e4m3.h"
#include "pages.h"

extern "C" {
// ops/page_shape.py has checked that every number is at least 1 and that a page has less than 2^31 elements.
struct kvx_page_shape {
  int32_t dtype;  // kvx::Dtype
  int32_t heads;
  int32_t runs;
  int32_t k_run;
  int32_t v_run;
  int32_t heads_first;
};
}

namespace kvx {

constexpr int64_t kPartAlign = 64;  // of scales and of codes: a line, and half of what a warp writes at once

KVX_DEVICE int64_t aligned_part(int64_t bytes) { return (bytes + kPartAlign - 1) / kPartAlign * kPartAlign; }

// Numbers that follow from a shape: of one layer's page, and of its part of a row.
struct PageSizes {
  int64_t elements;
  int64_t page_bytes;
  int64_t scale_bytes;  // before the codes
  int64_t part_bytes;
  int64_t head_stride;  // elements from one head to the next
  int64_t run_stride;   // elements from one run of a head to its next
};

KVX_DEVICE PageSizes sizes_of(const kvx_page_shape& shape) {
  const int64_t run = static_cast<int64_t>(shape.k_run) + shape.v_run;
  const int64_t elements = shape.heads * shape.runs * run;
  const int64_t scale_bytes = aligned_part(static_cast<int64_t>(shape.heads) * 2 * sizeof(float));
  return {elements,
          elements * (shape.dtype == kFloat32 ? 4 : 2),
          scale_bytes,
          scale_bytes + aligned_part(elements),
          shape.heads_first ? shape.runs * run : run,
          shape.heads_first ? run : shape.heads * run};
}

// Bytes of a row that a tensor's page takes; 0 where it is not one layer's page, or several.
inline int64_t part_bytes_of(const PageSizes& sizes, int64_t page_bytes) {
  return page_bytes % sizes.page_bytes == 0 ? page_bytes / sizes.page_bytes * sizes.part_bytes : 0;
}

// One element as a float, what is not finite as 0, and back.
template <Dtype dtype>
KVX_DEVICE float read_element(const uint8_t* from) {
  if (dtype == kFloat32) return tame(load<float>(from));
  return tame(dtype == kFloat16 ? from_float16(load<uint16_t>(from)) : from_bfloat16(load<uint16_t>(from)));
}

template <Dtype dtype>
KVX_DEVICE void write_element(uint8_t* to, float x) {
  if (dtype == kFloat32) return store(to, x);
  store(to, dtype == kFloat16 ? to_float16(x) : to_bfloat16(x));
}

// The bits of an element's magnitude, in the order of magnitudes; 0 for what is not finite.
template <Dtype dtype>
KVX_DEVICE uint32_t magnitude_bits(const uint8_t* from) {
  constexpr uint32_t mask = dtype == kFloat32 ? 0x7fffffff : 0x7fff;
  constexpr uint32_t beyond = dtype == kFloat32 ? 0x7f800000 : dtype == kFloat16 ? 0x7c00 : 0x7f80;
  const uint32_t rest = (dtype == kFloat32 ? load<uint32_t>(from) : load<uint16_t>(from)) & mask;
  return rest & (0u - static_cast<uint32_t>(rest < beyond));  // not a choice: gcc makes no vectors of it here
}

template <Dtype dtype>
KVX_DEVICE float magnitude(uint32_t bits) {
  if (dtype == kFloat32) return of_bits(bits);
  return dtype == kFloat16 ? from_float16(static_cast<uint16_t>(bits)) : from_bfloat16(static_cast<uint16_t>(bits));
}

template <Dtype dtype>
constexpr int64_t kElementBytes = dtype == kFloat32 ? 4 : 2;

}  // namespace kvx
