// The cachegen serde: keys and values in steps, predicted along tokens, entropy coded. Format in serde/README.md.
//
// A line is one channel of one head's keys or values over the tokens of a chunk. What is near in a line is alike, so a
// line is coded as differences from its mean or from the token before, whichever are smaller, under the one of 32
// shared models that fits their size. Lines are independent of each other; layers too, so a reader may stream them.
//
// Plain C interface; no state but the models, scratch only on the heap of the call; safe in any number of threads.
// Build without contraction of multiplications and additions: payloads are compared bit for bit.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <utility>
#include <vector>

#include "elements.h"
#include "models.h"

#define KVX_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace kvx;

constexpr int64_t kHeaderBytes = 24;
constexpr uint8_t kVersion = 1;
constexpr uint8_t kDelta = 0x80;  // in a line's byte: differences from the token before
constexpr int32_t kFarthest = 1 << 20;  // steps from 0; beyond it values are cut off
constexpr float kSpread = 8.0f;         // standard deviations that the bins of a layer cover

enum Refusal : int64_t {
  kTruncated = -1,
  kBadVersion = -2,
  kOtherLayout = -3,
  kBadDirectory = -4,
  kBadBody = -5,
  kNoMemory = -6,
  kNoRoom = -7,
};

// One layer's keys or its values.
struct Part {
  const kvx_layout* layout;
  const int64_t* cells;  // (heads, blocks)
  const int32_t* index;
  int64_t dim;

  int64_t tokens() const { return static_cast<int64_t>(layout->blocks) * layout->tokens; }
  int64_t lines() const { return layout->heads * dim; }
  int64_t fixed_bytes() const { return 4 * layout->heads + 3 * lines() + 8; }
};

Part part_of(const kvx_layout& layout, int64_t layer, bool keys) {
  const int64_t* cells = layout.cells + layer * layout.heads * layout.blocks;
  return {&layout, cells, keys ? layout.k_index : layout.v_index, keys ? layout.k_dim : layout.v_dim};
}

// ---- one head: x is (tokens, dim)

void load_head(const Part& part, int64_t head, const uint8_t* row, float* x) {
  const int64_t elements = part.layout->tokens * part.dim;
  for (int64_t block = 0; block < part.layout->blocks; ++block) {
    const uint8_t* cell = row + part.cells[head * part.layout->blocks + block];
    load_plane(*part.layout, cell, part.index, elements, x + block * elements);
  }
}

void store_head(const Part& part, int64_t head, const float* x, uint8_t* row) {
  const int64_t elements = part.layout->tokens * part.dim;
  for (int64_t block = 0; block < part.layout->blocks; ++block) {
    uint8_t* cell = row + part.cells[head * part.layout->blocks + block];
    store_plane(*part.layout, cell, part.index, elements, x + block * elements);
  }
}

// The root of the mean squared distance of elements from their line's mean. Sums run along tokens, then along lines, so
// that every machine rounds alike.
float deviation(const float* x, int64_t tokens, int64_t dim, float* mean, float* square) {
  std::fill(mean, mean + dim, 0.0f);
  std::fill(square, square + dim, 0.0f);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t d = 0; d < dim; ++d) mean[d] += x[t * dim + d];
  }
  for (int64_t d = 0; d < dim; ++d) mean[d] /= static_cast<float>(tokens);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t d = 0; d < dim; ++d) {
      const float away = x[t * dim + d] - mean[d];
      square[d] += away * away;
    }
  }
  float sum = 0.0f;
  for (int64_t d = 0; d < dim; ++d) sum += square[d];
  return std::sqrt(tame(sum) / static_cast<float>(tokens * dim));
}

// Which of the models fits residuals that sum up to so many steps in magnitude: a bell of deviation s has a mean
// magnitude of 0.8 s. Compares with the middle, in logarithms, between one class and the next.
int class_of(int64_t magnitudes, int64_t tokens) {
  // 2^20 * sqrt(2 / pi) * 2^((k - 9.5) / 4)
  static constexpr int64_t kUpTo[kClasses - 1] = {
      161285, 191801, 228091, 271248, 322570, 383602, 456183, 542496, 645140,
      767205, 912365, 1084991, 1290279, 1534409, 1824730, 2169982, 2580559, 3068819,
      3649461, 4339965, 5161117, 6137637, 7298922, 8679930, 10322234, 12275274, 14597844,
      17359859, 20644468, 24550549, 29195687};
  const int64_t mean = (magnitudes << 20) / tokens;
  return static_cast<int>(std::upper_bound(kUpTo, kUpTo + kClasses - 1, mean) - kUpTo);
}

// ---- encoding

struct Line {
  uint8_t kind;  // class, kDelta
  int16_t mean;
};

// Chooses how to code steps q[0, tokens) and leaves the residuals in their place.
Line predict(int32_t* q, int64_t tokens) {
  int64_t sum = 0;
  for (int64_t t = 0; t < tokens; ++t) sum += q[t];
  const int64_t rounded = (2 * sum + (sum < 0 ? -tokens : tokens)) / (2 * tokens);
  const auto mean = static_cast<int32_t>(std::clamp<int64_t>(rounded, INT16_MIN, INT16_MAX));
  int64_t from_mean = std::abs(q[0] - mean), from_last = from_mean;
  for (int64_t t = 1; t < tokens; ++t) {
    from_mean += std::abs(q[t] - mean);
    from_last += std::abs(q[t] - q[t - 1]);
  }
  const bool delta = from_last < from_mean;
  for (int64_t t = tokens - 1; t > 0; --t) q[t] -= delta ? q[t - 1] : mean;
  q[0] -= mean;
  const int k = class_of(delta ? from_last : from_mean, tokens);
  return {static_cast<uint8_t>(k | (delta ? kDelta : 0)), static_cast<int16_t>(mean)};
}

struct Encoder {
  std::vector<float> x, mean, square;
  std::vector<int32_t> q;  // (dim, tokens) of a head
  std::vector<Line> lines;
  std::vector<uint8_t> symbols;  // of all lines in the order of coding
  std::vector<uint8_t> kinds;    // of the same lines
  std::vector<int32_t> escapes;
};

// Lines of one head from the likeliest model to the next: few tables at a time.
template <typename Kind>
void order_lines(int64_t dim, const Kind& kind, std::vector<int32_t>* order) {
  order->resize(static_cast<size_t>(dim));
  int32_t at = 0;
  for (int k = 0; k < kClasses; ++k) {
    for (int32_t d = 0; d < dim; ++d) {
      if ((kind(d) & ~kDelta) == k) (*order)[static_cast<size_t>(at++)] = d;
    }
  }
}

void quantise_head(const Part& part, float step, Encoder* state) {
  const float inverse = step > 0x1p-120f ? 1.0f / step : 0.0f;
  const int64_t tokens = part.tokens();
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t d = 0; d < part.dim; ++d) {
      float y = state->x[static_cast<size_t>(t * part.dim + d)] * inverse;
      constexpr auto most = static_cast<float>(kFarthest);
      y = y > -most ? (y < most ? y : most) : -most;
      state->q[static_cast<size_t>(d * tokens + t)] = round_even(y);
    }
  }
}

// Appends one head's symbols to the state; returns its step.
float encode_head(const Part& part, int64_t head, const uint8_t* row, float bins, Encoder* state) {
  const int64_t tokens = part.tokens();
  load_head(part, head, row, state->x.data());
  const float spread = deviation(state->x.data(), tokens, part.dim, state->mean.data(), state->square.data());
  const float step = spread > 0x1p-100f ? spread * (kSpread / bins) : 0.0f;
  quantise_head(part, step, state);
  Line* lines = state->lines.data() + head * part.dim;
  for (int64_t d = 0; d < part.dim; ++d) lines[d] = predict(state->q.data() + d * tokens, tokens);
  std::vector<int32_t> order;
  order_lines(part.dim, [&](int32_t d) { return lines[d].kind; }, &order);
  for (const int32_t d : order) {
    state->kinds.push_back(lines[d].kind);
    const int32_t* residuals = state->q.data() + d * tokens;
    const rans::Model& model = models().model[lines[d].kind & ~kDelta];
    for (int64_t t = 0; t < tokens; ++t) {
      const auto symbol = static_cast<uint32_t>(residuals[t] + kReach);
      const bool fits = symbol < kEscape && model.frequency[symbol] != 0;
      state->symbols.push_back(fits ? static_cast<uint8_t>(symbol) : kEscape);
      if (!fits) state->escapes.push_back(residuals[t]);
    }
  }
  return step;
}

// Codes lines from the last to the first, groups of 32 tokens from the last to the first, backwards from `end`.
uint8_t* encode_stream(const Encoder& state, int64_t tokens, uint8_t* begin, uint8_t* end) {
  uint32_t states[rans::kLanes];
  std::fill(states, states + rans::kLanes, rans::kLow);
  uint8_t* out = end;
  for (auto line = static_cast<int64_t>(state.kinds.size()) - 1; line >= 0; --line) {
    const rans::EncodeEntry* entries = models().encode[state.kinds[static_cast<size_t>(line)] & ~kDelta];
    const uint8_t* symbols = state.symbols.data() + line * tokens;
    out = rans::encode_onto(symbols, tokens, entries, begin, out, states);
    if (out == nullptr) return nullptr;
  }
  return rans::finish(begin, out, states);
}

// Writes the body of a part at `out`; returns its length or a Refusal.
int64_t encode_part(const Part& part, const uint8_t* row, float bins, Encoder* state, uint8_t* out, uint8_t* end) {
  if (end - out < part.fixed_bytes()) return kNoRoom;
  state->symbols.clear(), state->kinds.clear(), state->escapes.clear();
  uint8_t* at = out;
  for (int64_t head = 0; head < part.layout->heads; ++head, at += 4) {
    store(at, encode_head(part, head, row, bins, state));
  }
  for (int64_t line = 0; line < part.lines(); ++line) *at++ = state->lines[static_cast<size_t>(line)].kind;
  for (int64_t line = 0; line < part.lines(); ++line, at += 2) {
    store(at, state->lines[static_cast<size_t>(line)].mean);
  }
  const auto escape_bytes = static_cast<int64_t>(4 * state->escapes.size());
  if (end - at - 8 < escape_bytes) return kNoRoom;
  uint8_t* const body = at + 8;
  uint8_t* const stream = encode_stream(*state, part.tokens(), body, end - escape_bytes);
  if (stream == nullptr) return kNoRoom;
  const int64_t stream_bytes = end - escape_bytes - stream;
  store(at, static_cast<uint32_t>(state->escapes.size()));
  store(at + 4, static_cast<uint32_t>(stream_bytes));
  std::memmove(body, stream, static_cast<size_t>(stream_bytes));
  if (escape_bytes > 0) std::memcpy(body + stream_bytes, state->escapes.data(), static_cast<size_t>(escape_bytes));
  return body + stream_bytes + escape_bytes - out;
}

// ---- decoding

struct Decoder {
  std::vector<float> x;
  std::vector<uint8_t> symbols;
  std::vector<int32_t> order;
};

// x[t * dim] for the tokens of a line, from its symbols; false where its escapes run out.
bool decode_line(const uint8_t* symbols, int64_t tokens, uint8_t kind, int32_t mean, float step, const uint8_t** escapes,
                 const uint8_t* end, float* x, int64_t dim) {
  uint32_t last = static_cast<uint32_t>(mean);  // wraps around on made-up residuals
  const bool delta = (kind & kDelta) != 0;
  for (int64_t t = 0; t < tokens; ++t) {
    uint32_t residual = static_cast<uint32_t>(symbols[t]) - kReach;
    if (symbols[t] == kEscape) {
      if (end - *escapes < 4) return false;
      residual = load<uint32_t>(*escapes);
      *escapes += 4;
    }
    const uint32_t q = last + residual;
    x[t * dim] = static_cast<float>(static_cast<int32_t>(q)) * step;
    if (delta) last = q;
  }
  return true;
}

bool decode_part(const Part& part, const uint8_t* body, int64_t bytes, rans::Isa isa, Decoder* state, uint8_t* row) {
  if (bytes < part.fixed_bytes()) return false;
  const int64_t tokens = part.tokens();
  const uint8_t* const kinds = body + 4 * part.layout->heads;
  const uint8_t* const means = kinds + part.lines();
  const uint8_t* const sizes = means + 2 * part.lines();
  const int64_t escape_bytes = 4 * static_cast<int64_t>(load<uint32_t>(sizes));
  const int64_t stream_bytes = load<uint32_t>(sizes + 4);
  if (part.fixed_bytes() + stream_bytes + escape_bytes != bytes) return false;
  for (int64_t line = 0; line < part.lines(); ++line) {
    if ((kinds[line] & ~kDelta) >= kClasses) return false;
  }
  rans::Reader reader;
  if (!rans::open(sizes + 8, stream_bytes, &reader)) return false;
  const uint8_t* escapes = sizes + 8 + stream_bytes;
  for (int64_t head = 0; head < part.layout->heads; ++head) {
    const uint8_t* kind = kinds + head * part.dim;
    const float step = tame(load<float>(body + 4 * head));
    order_lines(part.dim, [&](int32_t d) { return kind[d]; }, &state->order);
    for (const int32_t d : state->order) {
      const rans::DecodeTable& table = models().decode[kind[d] & ~kDelta];
      if (!rans::decode_from(&reader, table, state->symbols.data(), tokens, isa)) return false;
      const auto mean = load<int16_t>(means + 2 * (head * part.dim + d));
      if (!decode_line(state->symbols.data(), tokens, kind[d], mean, step, &escapes, body + bytes, state->x.data() + d,
                       part.dim)) {
        return false;
      }
    }
    for (float& value : state->x) value = tame(value);
    store_head(part, head, state->x.data(), row);
  }
  return rans::at_end(reader) && escapes == body + bytes;
}

// ---- containers

int64_t directory_end(const kvx_layout& layout) { return kHeaderBytes + 8 * static_cast<int64_t>(layout.layers); }

void write_header(const kvx_layout& layout, uint8_t* out) {
  std::memset(out, 0, kHeaderBytes);
  out[0] = kVersion;
  store(out + 2, static_cast<uint16_t>(layout.tokens));
  store(out + 4, static_cast<uint16_t>(layout.k_dim));
  store(out + 6, static_cast<uint16_t>(layout.v_dim));
  store(out + 8, layout.layers);
  store(out + 12, layout.heads);
  store(out + 16, layout.blocks);
}

}  // namespace

// Raised with every change of the interface below; ops/cachegen.py refuses another.
KVX_EXPORT int32_t kvx_cachegen_abi() { return 1; }

// The best instruction set of this machine, as rans::Isa.
KVX_EXPORT int32_t kvx_cachegen_isa() { return static_cast<int32_t>(rans::best_isa()); }

// Writes the payload of a row to out[0, out_bytes); returns its length or a Refusal. `bins` holds two numbers for each
// layer, of its keys and of its values: how many steps cover kSpread standard deviations.
KVX_EXPORT int64_t kvx_cachegen_encode(const kvx_layout* layout, const float* bins, const uint8_t* row, uint8_t* out,
                                       int64_t out_bytes) {
  if (out_bytes < directory_end(*layout)) return kNoRoom;
  const auto dim = static_cast<size_t>(std::max(layout->k_dim, layout->v_dim));
  const auto tokens = static_cast<size_t>(layout->blocks) * static_cast<size_t>(layout->tokens);
  Encoder state;
  state.x.resize(tokens * dim), state.q.resize(tokens * dim);
  state.mean.resize(dim), state.square.resize(dim);
  state.lines.resize(static_cast<size_t>(layout->heads) * dim);
  write_header(*layout, out);
  uint8_t* body = out + directory_end(*layout);
  for (int64_t i = 0; i < 2 * layout->layers; ++i) {
    const Part part = part_of(*layout, i / 2, i % 2 == 0);
    const int64_t bytes = encode_part(part, row, bins[i], &state, body, out + out_bytes);
    if (bytes < 0) return bytes;
    store(out + kHeaderBytes + 4 * i, static_cast<uint32_t>(bytes));
    body += bytes;
  }
  return body - out;
}

// Fills the elements of a row from a payload, and only them; returns 0 or a Refusal. Whatever the payload holds, it reads
// and writes within both.
KVX_EXPORT int64_t kvx_cachegen_decode(const kvx_layout* layout, const uint8_t* coded, int64_t coded_bytes, uint8_t* row,
                                       int32_t isa) {
  if (coded_bytes < directory_end(*layout)) return kTruncated;
  uint8_t header[kHeaderBytes];
  write_header(*layout, header);
  if (coded[0] != header[0]) return kBadVersion;
  if (std::memcmp(coded, header, kHeaderBytes) != 0) return kOtherLayout;
  int64_t total = directory_end(*layout);
  for (int64_t i = 0; i < 2 * layout->layers; ++i) total += load<uint32_t>(coded + kHeaderBytes + 4 * i);
  if (total != coded_bytes) return kBadDirectory;
  const auto tokens = static_cast<size_t>(layout->blocks) * static_cast<size_t>(layout->tokens);
  const auto dim = static_cast<size_t>(std::max(layout->k_dim, layout->v_dim));
  Decoder state;
  state.x.resize(tokens * dim), state.symbols.resize(tokens);
  const rans::Isa chosen = isa == 0 ? rans::best_isa() : static_cast<rans::Isa>(isa);
  const uint8_t* body = coded + directory_end(*layout);
  for (int64_t i = 0; i < 2 * layout->layers; ++i) {
    const int64_t bytes = load<uint32_t>(coded + kHeaderBytes + 4 * i);
    const Part part = part_of(*layout, i / 2, i % 2 == 0);
    if (!decode_part(part, body, bytes, chosen, &state, row)) return kBadBody;
    body += bytes;
  }
  return 0;
}
