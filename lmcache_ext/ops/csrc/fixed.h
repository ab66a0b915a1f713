// Codes of a fixed number of bits for each element, as hosts and GPUs write and read them; serde/README.md has them in
// prose. A payload's length follows from the layout, so there is nothing in one to be believed but its header, and every
// value in it decodes to something.

#pragma once

#include "e4m3.h"
#include "elements.h"

namespace kvx {
namespace fixed {

constexpr int64_t kHeaderBytes = 16;
constexpr uint8_t kVersion = 1;
constexpr int64_t kGroup = 32;  // elements of one scale in KIVI

enum Scheme : int32_t { kFp8 = 0, kInt8 = 1, kKivi4 = 2, kKivi2 = 3 };

enum Refusal : int64_t { kOtherLength = -1, kBadVersion = -2, kOtherLayout = -3, kNoMemory = -4, kBadScheme = -5 };

KVX_DEVICE bool is_scheme(int32_t scheme) { return scheme >= kFp8 && scheme <= kKivi2; }
KVX_DEVICE bool is_kivi(int32_t scheme) { return scheme >= kKivi4; }

// ---- a byte for each element of a cell's keys or values: a scale, then codes

KVX_DEVICE float scale_of(int32_t scheme, float most) {
  const float scale = most / (scheme == kFp8 ? kE4m3Most : 127.0f);
  return scale > 0x1p-120f ? scale : 0.0f;
}

KVX_DEVICE float inverse_of(float scale) { return scale > 0.0f ? 1.0f / scale : 0.0f; }

KVX_DEVICE uint8_t to_code(int32_t scheme, float y) {
  return scheme == kFp8 ? to_e4m3(y) : static_cast<uint8_t>(round_even(y));
}

KVX_DEVICE float from_code(int32_t scheme, uint8_t code) {
  return scheme == kFp8 ? from_e4m3(code) : static_cast<float>(static_cast<int8_t>(code));
}

// ---- KIVI: keys are grouped along tokens, values along channels; a least value and a step for each group

struct Walk {
  int64_t lines;        // that are cut into groups: channels of keys, tokens of values
  int64_t length;       // of each line
  int64_t line_stride;  // elements from one line to the next
  int64_t step_stride;  // elements from one to the next within a line

  KVX_DEVICE int64_t groups_of_line() const { return (length + kGroup - 1) / kGroup; }
};

KVX_DEVICE Walk walk_of(bool keys, int64_t tokens, int64_t dim) {
  return keys ? Walk{dim, tokens, 1, dim} : Walk{tokens, dim, dim, 1};
}

KVX_DEVICE int64_t group_bytes(int64_t count, int bits) { return 4 + (count * bits + 7) / 8; }

KVX_DEVICE int64_t line_bytes(int64_t length, int bits) {
  const int64_t whole = length / kGroup, rest = length % kGroup;
  return whole * group_bytes(kGroup, bits) + (rest ? group_bytes(rest, bits) : 0);
}

// One group of a line of a walk: elements first, first + stride, ...; where it begins in what is coded.
struct Group {
  int64_t first;
  int64_t stride;
  int64_t count;
  int64_t at;
};

KVX_DEVICE Group group_of(const Walk& walk, int bits, int64_t line, int64_t in_line) {
  const int64_t begin = in_line * kGroup;
  const int64_t count = walk.length - begin < kGroup ? walk.length - begin : kGroup;
  const int64_t at = line * line_bytes(walk.length, bits) + in_line * group_bytes(kGroup, bits);
  return {line * walk.line_stride + begin * walk.step_stride, walk.step_stride, count, at};
}

// What a group begins with: its least value and its step, in bfloat16.
struct Ends {
  uint16_t least;
  uint16_t step;
};

// Sums with 0 turn -0 into 0, so that nobody has to say which of two zeros is less.
template <int bits>
KVX_DEVICE Ends ends_of(float least, float most) {
  constexpr auto kLevels = static_cast<float>((1 << bits) - 1);
  return {to_bfloat16(least + 0.0f), to_bfloat16(most / kLevels - least / kLevels + 0.0f)};
}

KVX_DEVICE float inverse_of(const Ends& ends) {
  const float step = from_bfloat16(ends.step);
  return step > 0x1p-120f ? 1.0f / step : 0.0f;
}

// The level of an element; what is no number where extremes overflow is 0.
template <int bits>
KVX_DEVICE uint32_t level_of(float x, float least, float inverse) {
  constexpr auto kLevels = static_cast<float>((1 << bits) - 1);
  const float y = (x - least) * inverse;
  return static_cast<uint32_t>(round_even(y > 0.0f ? (y < kLevels ? y : kLevels) : 0.0f));
}

// `get(i)` is element i of the group.
template <int bits, typename Get>
KVX_DEVICE void encode_group(int64_t count, const Get& get, uint8_t* out) {
  float least = get(0), most = least;
  for (int64_t i = 1; i < count; ++i) {
    const float value = get(i);
    least = value < least ? value : least;
    most = value > most ? value : most;
  }
  const Ends ends = ends_of<bits>(least, most);
  store(out, ends);
  const float zero = from_bfloat16(ends.least), inverse = inverse_of(ends);
  constexpr int64_t kOfByte = 8 / bits;
  for (int64_t i = 0; i < count; i += kOfByte) {
    uint32_t packed = 0;
    for (int64_t j = 0; j < kOfByte && i + j < count; ++j) {
      packed |= level_of<bits>(get(i + j), zero, inverse) << j * bits;
    }
    out[4 + i / kOfByte] = static_cast<uint8_t>(packed);
  }
}

// Calls put(i, x) for the elements of the group.
template <int bits, typename Put>
KVX_DEVICE void decode_group(const uint8_t* in, int64_t count, const Put& put) {
  const auto ends = load<Ends>(in);
  const float least = tame(from_bfloat16(ends.least)), step = tame(from_bfloat16(ends.step));
  for (int64_t i = 0; i < count; ++i) {
    const int level = in[4 + i * bits / 8] >> i * bits % 8 & ((1 << bits) - 1);
    put(i, tame(least + static_cast<float>(level) * step));
  }
}

KVX_DEVICE int bits_of_kivi(int32_t scheme) { return scheme == kKivi4 ? 4 : 2; }

// ---- payloads

KVX_DEVICE int64_t plane_bytes(int32_t scheme, bool keys, int64_t tokens, int64_t dim) {
  if (!is_kivi(scheme)) return 4 + tokens * dim;
  const Walk way = walk_of(keys, tokens, dim);
  return way.lines * line_bytes(way.length, bits_of_kivi(scheme));
}

KVX_DEVICE int64_t plane_bytes(const kvx_layout& layout, int32_t scheme, bool keys) {
  return plane_bytes(scheme, keys, layout.tokens, keys ? layout.k_dim : layout.v_dim);
}

KVX_DEVICE int64_t payload_bytes(const kvx_layout& layout, int32_t scheme) {
  const int64_t cell = plane_bytes(layout, scheme, true) + plane_bytes(layout, scheme, false);
  return kHeaderBytes + num_cells(layout) * cell;
}

KVX_DEVICE void write_header(const kvx_layout& layout, int32_t scheme, uint8_t* out) {
  out[0] = kVersion;
  out[1] = static_cast<uint8_t>(scheme);
  store(out + 2, static_cast<uint16_t>(layout.tokens));
  store(out + 4, static_cast<uint16_t>(layout.k_dim));
  store(out + 6, static_cast<uint16_t>(layout.v_dim));
  store(out + 8, static_cast<uint64_t>(num_cells(layout)));
}

// 0 for a payload of such rows, or a Refusal; reads the header only.
KVX_DEVICE int64_t judge(const kvx_layout& layout, int32_t scheme, const uint8_t* coded, int64_t coded_bytes) {
  if (!is_scheme(scheme)) return kBadScheme;
  if (coded_bytes != payload_bytes(layout, scheme)) return kOtherLength;
  uint8_t header[kHeaderBytes];
  write_header(layout, scheme, header);
  if (coded[0] != header[0]) return kBadVersion;
  for (int64_t i = 0; i < kHeaderBytes; ++i) {
    if (coded[i] != header[i]) return kOtherLayout;
  }
  return 0;
}

}  // namespace fixed
}  // namespace kvx
