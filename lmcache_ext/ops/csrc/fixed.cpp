// Codecs of a fixed number of bits for each element: fp8, int8, and the 4 and 2 bits of KIVI. Formats in
// serde/README.md. A payload's length follows from the layout, so there is nothing in one to be believed but its
// header, and every value in it decodes to something.
//
// Plain C interface; no state, scratch only on the heap of the call; safe in any number of threads.
// Build without contraction of multiplications and additions: results are compared bit for bit.

#include <cstdlib>
#include <initializer_list>
#include <memory>

#include "e4m3.h"
#include "elements.h"

#define KVX_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace kvx;

constexpr int64_t kHeaderBytes = 16;
constexpr uint8_t kVersion = 1;
constexpr int64_t kGroup = 32;  // elements of one scale in KIVI

enum Scheme : int32_t { kFp8 = 0, kInt8 = 1, kKivi4 = 2, kKivi2 = 3 };

enum Refusal : int64_t { kOtherLength = -1, kBadVersion = -2, kOtherLayout = -3, kNoMemory = -4, kBadScheme = -5 };

// ---- one cell's keys or values: tokens x dim, a scale, a byte for each element

template <int32_t scheme>
void encode_bytes(const float* x, int64_t count, uint8_t* out) {
  constexpr float most = scheme == kFp8 ? 448.0f : 127.0f;
  const float scale = absmax(x, count) / most;
  const float inverse = scale > 0x1p-120f ? 1.0f / scale : 0.0f;
  store(out, inverse > 0.0f ? scale : 0.0f);
  for (int64_t i = 0; i < count; ++i) {
    const float y = x[i] * inverse;
    out[4 + i] = scheme == kFp8 ? to_e4m3(y) : static_cast<uint8_t>(round_even(y));
  }
}

template <int32_t scheme>
void decode_bytes(const uint8_t* in, int64_t count, float* x) {
  const float scale = tame(load<float>(in));
  for (int64_t i = 0; i < count; ++i) {
    const float y = scheme == kFp8 ? from_e4m3(in[4 + i]) : static_cast<float>(static_cast<int8_t>(in[4 + i]));
    x[i] = tame(y * scale);
  }
}

// ---- KIVI: keys are grouped along tokens, values along channels; a least value and a step for each group

struct Walk {
  int64_t lines;        // that are cut into groups: channels of keys, tokens of values
  int64_t length;       // of each line
  int64_t line_stride;  // elements from one line to the next
  int64_t step_stride;  // elements from one to the next within a line
};

Walk walk_of(bool keys, int64_t tokens, int64_t dim) {
  return keys ? Walk{dim, tokens, 1, dim} : Walk{tokens, dim, dim, 1};
}

int64_t group_bytes(int64_t count, int bits) { return 4 + (count * bits + 7) / 8; }

int64_t line_bytes(int64_t length, int bits) {
  const int64_t whole = length / kGroup, rest = length % kGroup;
  return whole * group_bytes(kGroup, bits) + (rest ? group_bytes(rest, bits) : 0);
}

void encode_group(const float* x, int64_t stride, int64_t count, int bits, uint8_t* out) {
  float least = x[0], most = x[0];
  for (int64_t i = 1; i < count; ++i) {
    const float value = x[i * stride];
    least = value < least ? value : least;
    most = value > most ? value : most;
  }
  const auto levels = static_cast<float>((1 << bits) - 1);
  const uint16_t base = to_bfloat16(least), step = to_bfloat16(most / levels - least / levels);
  store(out, base);
  store(out + 2, step);
  std::memset(out + 4, 0, static_cast<size_t>((count * bits + 7) / 8));
  const float zero = from_bfloat16(base), width = from_bfloat16(step);
  const float inverse = width > 0x1p-120f ? 1.0f / width : 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    float y = (x[i * stride] - zero) * inverse;
    y = y > 0.0f ? (y < levels ? y : levels) : 0.0f;  // no number where extremes overflow: 0
    out[4 + i * bits / 8] |= static_cast<uint8_t>(round_even(y) << i * bits % 8);
  }
}

void decode_group(const uint8_t* in, int64_t stride, int64_t count, int bits, float* x) {
  const float zero = tame(from_bfloat16(load<uint16_t>(in)));
  const float width = tame(from_bfloat16(load<uint16_t>(in + 2)));
  for (int64_t i = 0; i < count; ++i) {
    const int level = in[4 + i * bits / 8] >> i * bits % 8 & ((1 << bits) - 1);
    x[i * stride] = tame(zero + static_cast<float>(level) * width);
  }
}

template <typename Group>
void walk(const Walk& walk, int bits, const Group& group) {
  int64_t at = 0;
  for (int64_t line = 0; line < walk.lines; ++line) {
    for (int64_t i = 0; i < walk.length; i += kGroup) {
      const int64_t count = walk.length - i < kGroup ? walk.length - i : kGroup;
      group(line * walk.line_stride + i * walk.step_stride, walk.step_stride, count, at);
      at += group_bytes(count, bits);
    }
  }
}

// ---- a cell's keys or values in any scheme

int kivi_bits(int32_t scheme) { return scheme == kKivi4 ? 4 : 2; }

int64_t plane_bytes(int32_t scheme, bool keys, int64_t tokens, int64_t dim) {
  if (scheme == kFp8 || scheme == kInt8) return 4 + tokens * dim;
  const Walk way = walk_of(keys, tokens, dim);
  return way.lines * line_bytes(way.length, kivi_bits(scheme));
}

void encode_plane(int32_t scheme, bool keys, int64_t tokens, int64_t dim, const float* x, uint8_t* out) {
  if (scheme == kFp8) return encode_bytes<kFp8>(x, tokens * dim, out);
  if (scheme == kInt8) return encode_bytes<kInt8>(x, tokens * dim, out);
  const int bits = kivi_bits(scheme);
  walk(walk_of(keys, tokens, dim), bits, [&](int64_t first, int64_t stride, int64_t count, int64_t at) {
    encode_group(x + first, stride, count, bits, out + at);
  });
}

void decode_plane(int32_t scheme, bool keys, int64_t tokens, int64_t dim, const uint8_t* in, float* x) {
  if (scheme == kFp8) return decode_bytes<kFp8>(in, tokens * dim, x);
  if (scheme == kInt8) return decode_bytes<kInt8>(in, tokens * dim, x);
  const int bits = kivi_bits(scheme);
  walk(walk_of(keys, tokens, dim), bits, [&](int64_t first, int64_t stride, int64_t count, int64_t at) {
    decode_group(in + at, stride, count, bits, x + first);
  });
}

int64_t payload_bytes(const kvx_layout& layout, int32_t scheme) {
  const int64_t cell = plane_bytes(scheme, true, layout.tokens, layout.k_dim) +
                       plane_bytes(scheme, false, layout.tokens, layout.v_dim);
  return kHeaderBytes + num_cells(layout) * cell;
}

void write_header(const kvx_layout& layout, int32_t scheme, uint8_t* out) {
  out[0] = kVersion;
  out[1] = static_cast<uint8_t>(scheme);
  store(out + 2, static_cast<uint16_t>(layout.tokens));
  store(out + 4, static_cast<uint16_t>(layout.k_dim));
  store(out + 6, static_cast<uint16_t>(layout.v_dim));
  store(out + 8, static_cast<uint64_t>(num_cells(layout)));
}

std::unique_ptr<float, void (*)(void*)> scratch(const kvx_layout& layout) {
  const int64_t dim = layout.k_dim > layout.v_dim ? layout.k_dim : layout.v_dim;
  const auto bytes = static_cast<size_t>(layout.tokens * dim) * sizeof(float);
  return {static_cast<float*>(std::malloc(bytes)), std::free};
}

}  // namespace

// Raised with every change of the interface below; ops/fixed.py refuses another.
KVX_EXPORT int32_t kvx_fixed_abi() { return 1; }

// The length of every payload of rows of this layout, or kBadScheme.
KVX_EXPORT int64_t kvx_fixed_bytes(const kvx_layout* layout, int32_t scheme) {
  return scheme < kFp8 || scheme > kKivi2 ? static_cast<int64_t>(kBadScheme) : payload_bytes(*layout, scheme);
}

// Writes the payload of a row to out[0, out_bytes), which must be kvx_fixed_bytes; 0 or a Refusal.
KVX_EXPORT int64_t kvx_fixed_encode(const kvx_layout* layout, int32_t scheme, const uint8_t* row, uint8_t* out,
                                    int64_t out_bytes) {
  if (scheme < kFp8 || scheme > kKivi2) return kBadScheme;
  if (out_bytes != payload_bytes(*layout, scheme)) return kOtherLength;
  const auto x = scratch(*layout);
  if (!x) return kNoMemory;
  write_header(*layout, scheme, out);
  out += kHeaderBytes;
  for (int64_t cell = 0; cell < num_cells(*layout); ++cell) {
    for (const bool keys : {true, false}) {
      const int64_t dim = keys ? layout->k_dim : layout->v_dim;
      const int32_t* index = keys ? layout->k_index : layout->v_index;
      load_plane(*layout, row + layout->cells[cell], index, layout->tokens * dim, x.get());
      encode_plane(scheme, keys, layout->tokens, dim, x.get(), out);
      out += plane_bytes(scheme, keys, layout->tokens, dim);
    }
  }
  return 0;
}

// Fills the elements of a row from a payload, and only them; 0 or a Refusal, before it has touched the row.
KVX_EXPORT int64_t kvx_fixed_decode(const kvx_layout* layout, int32_t scheme, const uint8_t* coded,
                                    int64_t coded_bytes, uint8_t* row) {
  if (scheme < kFp8 || scheme > kKivi2) return kBadScheme;
  if (coded_bytes != payload_bytes(*layout, scheme)) return kOtherLength;
  uint8_t header[kHeaderBytes];
  write_header(*layout, scheme, header);
  if (coded[0] != header[0]) return kBadVersion;
  if (std::memcmp(coded, header, kHeaderBytes) != 0) return kOtherLayout;
  const auto x = scratch(*layout);
  if (!x) return kNoMemory;
  coded += kHeaderBytes;
  for (int64_t cell = 0; cell < num_cells(*layout); ++cell) {
    for (const bool keys : {true, false}) {
      const int64_t dim = keys ? layout->k_dim : layout->v_dim;
      const int32_t* index = keys ? layout->k_index : layout->v_index;
      decode_plane(scheme, keys, layout->tokens, dim, coded, x.get());
      store_plane(*layout, row + layout->cells[cell], index, layout->tokens * dim, x.get());
      coded += plane_bytes(scheme, keys, layout->tokens, dim);
    }
  }
  return 0;
}
