// Rows whose elements are known: where each key and value lies, and what its bits mean.
//
// A row holds `layers * heads * blocks` cells, heads counted over all ranks. A cell has the keys and the values of
// one layer, head and block: `tokens` vectors each. Element (t, d) of its keys lies `k_index[t * k_dim + d]` elements
// from the cell's beginning, values likewise; an index may be a permutation as odd as an instruction set wants it.
//
//     cells[(layer * heads + head) * blocks + block]    bytes from the beginning of the row

#pragma once

#include <cstdint>
#include <cstring>

#include "device.h"

extern "C" {
// Rows of ops/layout.py, which has checked that every element lies in the row.
struct kvx_layout {
  int64_t row_bytes;
  const int64_t* cells;
  const int32_t* k_index;
  const int32_t* v_index;
  int32_t dtype;  // kvx::Dtype
  int32_t layers;
  int32_t heads;
  int32_t blocks;
  int32_t tokens;  // of a block
  int32_t k_dim;
  int32_t v_dim;
};
}

namespace kvx {

enum Dtype : int32_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

template <typename T>
KVX_DEVICE T load(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

template <typename T>
KVX_DEVICE void store(uint8_t* to, T value) {
  std::memcpy(to, &value, sizeof(T));
}

// The same where the address is a multiple of the size: a GPU takes what is not byte by byte.
template <typename T>
KVX_DEVICE T load_aligned(const uint8_t* from) {
  T value;
  std::memcpy(&value, __builtin_assume_aligned(from, sizeof(T)), sizeof(T));
  return value;
}

template <typename T>
KVX_DEVICE void store_aligned(uint8_t* to, T value) {
  std::memcpy(__builtin_assume_aligned(to, sizeof(T)), &value, sizeof(T));
}

KVX_DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

KVX_DEVICE float of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

KVX_DEVICE float from_bfloat16(uint16_t h) { return of_bits(static_cast<uint32_t>(h) << 16); }

// To the nearest, ties to even. Finite values only, as everything here is by then.
KVX_DEVICE uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

KVX_DEVICE float from_float16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t rest = h & 0x7fff;
  // as a float with the exponent of 2^-112 too little, which one exact multiplication puts right
  const uint32_t number = bits_of(of_bits(rest << 13) * of_bits(0x77800000));
  return of_bits(sign | (rest >= 0x7c00 ? 0x7f800000 | (rest & 0x3ff) << 13 : number));
}

// To the nearest, ties to even; beyond the largest float16, that one.
KVX_DEVICE uint16_t to_float16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rest = bits & 0x7fffffff;
  const uint32_t normal = ((rest + 0xfff + (rest >> 13 & 1)) - 0x38000000) >> 13;
  const uint32_t subnormal = bits_of(of_bits(rest) + 0.5f) - 0x3f000000;  // rounded to a multiple of 2^-24
  const uint32_t code = rest < 0x38800000 ? subnormal : normal;
  return static_cast<uint16_t>((bits >> 16 & 0x8000) | (rest >= 0x477ff000 ? 0x7bff : code));
}

// What is no finite number becomes 0: it must not spoil the scale of its neighbours.
KVX_DEVICE float tame(float x) { return (bits_of(x) & 0x7f800000) == 0x7f800000 ? 0.0f : x; }

KVX_DEVICE int64_t num_cells(const kvx_layout& layout) {
  return static_cast<int64_t>(layout.layers) * layout.heads * layout.blocks;
}

// One element, as float32.
KVX_DEVICE float load_element(const kvx_layout& layout, const uint8_t* cell, int64_t index) {
  if (layout.dtype == kFloat32) return tame(load_aligned<float>(cell + 4 * index));
  const auto half = load_aligned<uint16_t>(cell + 2 * index);
  return tame(layout.dtype == kFloat16 ? from_float16(half) : from_bfloat16(half));
}

// One element, rounded to the row's dtype.
KVX_DEVICE void store_element(const kvx_layout& layout, uint8_t* cell, int64_t index, float x) {
  if (layout.dtype == kFloat32) {
    store_aligned(cell + 4 * index, x);
  } else {
    store_aligned(cell + 2 * index, layout.dtype == kFloat16 ? to_float16(x) : to_bfloat16(x));
  }
}

constexpr int64_t kRun = 16;

// Which elements of a cell are its keys, or its values: (tokens, dim).
struct Index {
  const int32_t* at;
  int64_t count;
  bool in_runs;  // whether each kRun of them lie behind each other: read as vectors then
};

inline Index index_of(const kvx_layout& layout, bool keys) {
  const int32_t* const at = keys ? layout.k_index : layout.v_index;
  const int64_t count = static_cast<int64_t>(layout.tokens) * (keys ? layout.k_dim : layout.v_dim);
  int32_t away = 0;
  for (int64_t first = 0; first + kRun <= count; first += kRun) {
    for (int32_t i = 0; i < kRun; ++i) away |= at[first + i] - at[first] - i;
  }
  return {at, count, count % kRun == 0 && away == 0};
}

template <typename T, typename Convert>
void load_each(const uint8_t* cell, const Index& index, const Convert& convert, float* out) {
  constexpr auto kBytes = static_cast<int64_t>(sizeof(T));
  if (!index.in_runs) {
    for (int64_t i = 0; i < index.count; ++i) out[i] = tame(convert(load<T>(cell + kBytes * index.at[i])));
    return;
  }
  for (int64_t first = 0; first < index.count; first += kRun) {
    T run[kRun];
    std::memcpy(run, cell + kBytes * index.at[first], sizeof(run));
    for (int64_t i = 0; i < kRun; ++i) out[first + i] = tame(convert(run[i]));
  }
}

template <typename T, typename Convert>
void store_each(uint8_t* cell, const Index& index, const Convert& convert, const float* in) {
  constexpr auto kBytes = static_cast<int64_t>(sizeof(T));
  if (!index.in_runs) {
    for (int64_t i = 0; i < index.count; ++i) store<T>(cell + kBytes * index.at[i], convert(in[i]));
    return;
  }
  for (int64_t first = 0; first < index.count; first += kRun) {
    T run[kRun];
    for (int64_t i = 0; i < kRun; ++i) run[i] = convert(in[first + i]);
    std::memcpy(cell + kBytes * index.at[first], run, sizeof(run));
  }
}

// The elements of a plane, as float32.
inline void load_plane(const kvx_layout& layout, const uint8_t* cell, const Index& index, float* out) {
  if (layout.dtype == kFloat32) return load_each<float>(cell, index, [](float x) { return x; }, out);
  if (layout.dtype == kFloat16) return load_each<uint16_t>(cell, index, from_float16, out);
  load_each<uint16_t>(cell, index, from_bfloat16, out);
}

// The same the other way, rounded to the row's dtype.
inline void store_plane(const kvx_layout& layout, uint8_t* cell, const Index& index, const float* in) {
  if (layout.dtype == kFloat32) return store_each<float>(cell, index, [](float x) { return x; }, in);
  if (layout.dtype == kFloat16) return store_each<uint16_t>(cell, index, to_float16, in);
  store_each<uint16_t>(cell, index, to_bfloat16, in);
}

inline float absmax(const float* x, int64_t count) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t rest = bits_of(x[i]) & 0x7fffffff;
    most = rest > most ? rest : most;
  }
  return of_bits(most);
}

// Rounded to the nearest integer, ties to even, of |x| < 2^22.
KVX_DEVICE int32_t round_even(float x) { return static_cast<int32_t>(bits_of(x + 12582912.0f)) - 0x4b400000; }

}  // namespace kvx
