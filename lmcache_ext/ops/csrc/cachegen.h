// The cachegen container as hosts and GPUs write and read it; serde/README.md has it in prose.

#pragma once

#include "elements.h"
#include "models.h"

namespace kvx {
namespace cachegen {

constexpr int64_t kHeaderBytes = 24;
constexpr uint8_t kVersion = 2;
constexpr uint8_t kOneStreamVersion = 1;  // which is read too: a part was one stream, whatever its length
constexpr uint8_t kDelta = 0x80;          // in a line's byte: differences from the token before
constexpr int32_t kFarthest = 1 << 20;    // steps from 0; beyond it values are cut off
constexpr float kSpread = 8.0f;           // standard deviations that the bins of a layer cover
// Symbols that a stream has at least, where the part has them: its states cost less than a hundredth then, and a chunk
// of a large model has a stream for each of its heads, hundreds for the warps of a GPU.
#if defined(KVX_STREAM_SYMBOLS)
constexpr int64_t kStreamSymbols = KVX_STREAM_SYMBOLS;  // of the tests, whose parts are small
#else
constexpr int64_t kStreamSymbols = 1 << 15;
#endif

enum Refusal : int64_t {
  kTruncated = -1,
  kBadVersion = -2,
  kOtherLayout = -3,
  kBadDirectory = -4,
  kBadBody = -5,
  kNoMemory = -6,
  kNoRoom = -7,
};

KVX_DEVICE int64_t tokens_of(const kvx_layout& layout) { return static_cast<int64_t>(layout.blocks) * layout.tokens; }

// How many heads share a stream in what we write; the last stream of a part may have fewer.
KVX_DEVICE int32_t stream_heads(const kvx_layout& layout) {
  const int64_t head = tokens_of(layout) * (layout.k_dim > layout.v_dim ? layout.k_dim : layout.v_dim);
  const int64_t heads = (kStreamSymbols + head - 1) / head;
  return heads < layout.heads ? static_cast<int32_t>(heads) : layout.heads;
}

// One layer's keys or its values.
struct Part {
  const kvx_layout* layout;
  const int64_t* cells;  // (heads, blocks)
  const int32_t* index;
  int32_t dim;
  int32_t stream_heads;

  KVX_DEVICE int64_t tokens() const { return tokens_of(*layout); }
  KVX_DEVICE int64_t lines() const { return static_cast<int64_t>(layout->heads) * dim; }
  KVX_DEVICE int32_t streams() const { return (layout->heads + stream_heads - 1) / stream_heads; }
  KVX_DEVICE int64_t fixed_bytes() const { return sizes_at() + 8 * streams(); }
  // Where fields of a body begin; steps come first.
  KVX_DEVICE int64_t kinds_at() const { return 4 * static_cast<int64_t>(layout->heads); }
  KVX_DEVICE int64_t means_at() const { return kinds_at() + lines(); }
  KVX_DEVICE int64_t sizes_at() const { return means_at() + 2 * lines(); }
  KVX_DEVICE int32_t first_head(int32_t stream) const { return stream * stream_heads; }
  KVX_DEVICE int32_t end_head(int32_t stream) const {
    return stream + 1 < streams() ? (stream + 1) * stream_heads : layout->heads;
  }
};

KVX_DEVICE Part part_of(const kvx_layout& layout, int32_t stream_heads, int64_t part) {
  const int64_t* cells = layout.cells + part / 2 * layout.heads * layout.blocks;
  const bool keys = part % 2 == 0;
  return {&layout, cells, keys ? layout.k_index : layout.v_index, keys ? layout.k_dim : layout.v_dim, stream_heads};
}

KVX_DEVICE int64_t directory_end(const kvx_layout& layout) {
  return kHeaderBytes + 8 * static_cast<int64_t>(layout.layers);
}

KVX_DEVICE void write_header(const kvx_layout& layout, uint8_t version, int32_t stream_heads, uint8_t* out) {
  store(out, static_cast<uint16_t>(version));
  store(out + 2, static_cast<uint16_t>(layout.tokens));
  store(out + 4, static_cast<uint16_t>(layout.k_dim));
  store(out + 6, static_cast<uint16_t>(layout.v_dim));
  store(out + 8, layout.layers);
  store(out + 12, layout.heads);
  store(out + 16, layout.blocks);
  store(out + 20, stream_heads);
}

// The heads of a stream of the payload, or a Refusal; reads the header only.
KVX_DEVICE int64_t read_header(const kvx_layout& layout, const uint8_t* coded, int64_t coded_bytes) {
  if (coded_bytes < directory_end(layout)) return kTruncated;
  const uint8_t version = coded[0];
  if (version != kVersion && version != kOneStreamVersion) return kBadVersion;
  const auto heads = load<int32_t>(coded + 20);
  uint8_t header[kHeaderBytes];
  write_header(layout, version, heads, header);
  for (int64_t i = 0; i < kHeaderBytes; ++i) {
    if (coded[i] != header[i]) return kOtherLayout;
  }
  if (version == kOneStreamVersion) return heads == 0 ? layout.heads : static_cast<int64_t>(kOtherLayout);
  return heads >= 1 && heads <= layout.heads ? heads : static_cast<int64_t>(kOtherLayout);
}

// The step of a head whose elements have this deviation, and how many steps a unit has: 0 where there is nothing.
KVX_DEVICE float step_of(float spread, float bins) { return spread > 0x1p-100f ? spread * (kSpread / bins) : 0.0f; }
KVX_DEVICE float inverse_of(float step) { return step > 0x1p-120f ? 1.0f / step : 0.0f; }

KVX_DEVICE int32_t quantise(float x, float inverse) {
  constexpr auto most = static_cast<float>(kFarthest);
  const float y = x * inverse;
  return round_even(y > -most ? (y < most ? y : most) : -most);
}

// The mean of `tokens` steps that sum up to `sum`, rounded away from zero at half, as a line stores it.
KVX_DEVICE int32_t mean_of(int64_t sum, int64_t tokens) {
  const int64_t rounded = (2 * sum + (sum < 0 ? -tokens : tokens)) / (2 * tokens);
  return static_cast<int32_t>(rounded < INT16_MIN ? INT16_MIN : rounded > INT16_MAX ? INT16_MAX : rounded);
}

// Which of the models fits residuals that sum up to so many steps in magnitude: a bell of deviation s has a mean
// magnitude of 0.8 s. Compares with the middle, in logarithms, between one class and the next.
KVX_DEVICE int class_of(int64_t magnitudes, int64_t tokens) {
  // 2^20 * sqrt(2 / pi) * 2^((k - 9.5) / 4)
  static constexpr int64_t kUpTo[kClasses - 1] = {
      161285, 191801, 228091, 271248, 322570, 383602, 456183, 542496, 645140,
      767205, 912365, 1084991, 1290279, 1534409, 1824730, 2169982, 2580559, 3068819,
      3649461, 4339965, 5161117, 6137637, 7298922, 8679930, 10322234, 12275274, 14597844,
      17359859, 20644468, 24550549, 29195687};
  const int64_t mean = (magnitudes << 20) / tokens;
  int k = 0;
  for (const int64_t up_to : kUpTo) k += up_to <= mean;
  return k;
}

}  // namespace cachegen
}  // namespace kvx
