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

#include "cachegen.h"
#include "rans.h"

#define KVX_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace kvx;
using namespace kvx::cachegen;

// ---- one head: x is (tokens, dim)

void load_head(const Part& part, const Index& index, int64_t head, const uint8_t* row, float* x) {
  for (int64_t block = 0; block < part.layout->blocks; ++block) {
    const uint8_t* cell = row + part.cells[head * part.layout->blocks + block];
    load_plane(*part.layout, cell, index, x + block * index.count);
  }
}

void store_head(const Part& part, const Index& index, int64_t head, const float* x, uint8_t* row) {
  for (int64_t block = 0; block < part.layout->blocks; ++block) {
    uint8_t* cell = row + part.cells[head * part.layout->blocks + block];
    store_plane(*part.layout, cell, index, x + block * index.count);
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

// ---- encoding

struct Line {
  uint8_t kind;  // class, kDelta
  int16_t mean;
};

// Chooses how to code steps q[0, tokens) and leaves the residuals in their place.
Line predict(int32_t* q, int64_t tokens) {
  int64_t sum = 0;
  for (int64_t t = 0; t < tokens; ++t) sum += q[t];
  const int32_t mean = mean_of(sum, tokens);
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
  Index index;  // of the part
  std::vector<float> x, mean, square;
  std::vector<int32_t> q;  // (dim, tokens) of a head
  std::vector<Line> lines;
  std::vector<uint8_t> symbols;  // of all lines of a stream in the order of coding
  std::vector<uint8_t> kinds;    // of the same lines
  std::vector<int32_t> order;    // of the lines of a head
  std::vector<int32_t> escapes;  // of all streams of a part
};

// Lines of one head by class, and then by element: few tables at a time.
template <typename Kind>
void order_lines(int32_t dim, const Kind& kind, std::vector<int32_t>* order) {
  int32_t at[kClasses + 1] = {};
  for (int32_t d = 0; d < dim; ++d) ++at[(kind(d) & ~kDelta) + 1];
  for (int k = 0; k < kClasses; ++k) at[k + 1] += at[k];
  order->resize(static_cast<size_t>(dim));
  for (int32_t d = 0; d < dim; ++d) (*order)[static_cast<size_t>(at[kind(d) & ~kDelta]++)] = d;
}

constexpr int64_t kTile = 16;

// to: (columns, rows) from (rows, columns), each element changed. In tiles, so that both sides are in caches.
template <typename From, typename To, typename Change>
void transpose(const From* from, int64_t rows, int64_t columns, const Change& change, To* to) {
  To tile[kTile * kTile];
  for (int64_t r = 0; r < rows; r += kTile) {
    for (int64_t c = 0; c < columns; c += kTile) {
      const int64_t height = std::min(kTile, rows - r), width = std::min(kTile, columns - c);
      if (height < kTile || width < kTile) {
        for (int64_t i = 0; i < height; ++i) {
          for (int64_t j = 0; j < width; ++j) to[(c + j) * rows + r + i] = change(from[(r + i) * columns + c + j]);
        }
        continue;
      }
      for (int64_t i = 0; i < kTile; ++i) {
        for (int64_t j = 0; j < kTile; ++j) tile[i * kTile + j] = change(from[(r + i) * columns + c + j]);
      }
      for (int64_t j = 0; j < kTile; ++j) {
        for (int64_t i = 0; i < kTile; ++i) to[(c + j) * rows + r + i] = tile[i * kTile + j];
      }
    }
  }
}

// Makes symbols of residuals; returns how many escape.
int64_t symbols_of(const int32_t* residuals, int64_t tokens, int32_t reach, uint8_t* out) {
  int32_t escapes = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    const bool fits = residuals[t] >= -reach && residuals[t] <= reach;
    out[t] = static_cast<uint8_t>(fits ? residuals[t] + kReach : kEscape);
    escapes += !fits;
  }
  return escapes;
}

// Adds one head's symbols to the state; returns its step.
float encode_head(const Part& part, int64_t head, const uint8_t* row, float bins, Encoder* state) {
  const int64_t tokens = part.tokens();
  load_head(part, state->index, head, row, state->x.data());
  const float spread = deviation(state->x.data(), tokens, part.dim, state->mean.data(), state->square.data());
  const float step = step_of(spread, bins), inverse = inverse_of(step);
  transpose(state->x.data(), tokens, part.dim, [&](float x) { return quantise(x, inverse); }, state->q.data());
  Line* lines = state->lines.data() + head * part.dim;
  for (int64_t d = 0; d < part.dim; ++d) lines[d] = predict(state->q.data() + d * tokens, tokens);
  order_lines(part.dim, [&](int32_t d) { return lines[d].kind; }, &state->order);
  for (const int32_t d : state->order) {
    const int32_t* residuals = state->q.data() + d * tokens;
    uint8_t* const symbols = state->symbols.data() + static_cast<int64_t>(state->kinds.size()) * tokens;
    const int64_t escapes = symbols_of(residuals, tokens, models().reach[lines[d].kind & ~kDelta], symbols);
    state->kinds.push_back(lines[d].kind);
    for (int64_t t = 0; escapes > 0 && t < tokens; ++t) {
      if (symbols[t] == kEscape) state->escapes.push_back(residuals[t]);
    }
  }
  return step;
}

// Codes lines from the last to the first, groups of 32 tokens from the last to the first, backwards from `end`.
template <rans::Isa isa>
uint8_t* encode_stream(const Encoder& state, int64_t tokens, uint8_t* begin, uint8_t* end) {
  uint32_t states[rans::kLanes];
  std::fill(states, states + rans::kLanes, rans::kLow);
  uint8_t* out = end;
  for (auto line = static_cast<int64_t>(state.kinds.size()) - 1; line >= 0; --line) {
    const int k = state.kinds[static_cast<size_t>(line)] & ~kDelta;
    const uint8_t* symbols = state.symbols.data() + line * tokens;
    out = rans::encode_onto<isa>(symbols, tokens, models().encode[k], models().wide[k], begin, out, states);
    if (out == nullptr) return nullptr;
  }
  return rans::finish(begin, out, states);
}

// Writes one stream in [at, end), whose steps belong at `steps` and sizes at `sizes`; returns where it ends, or null.
template <rans::Isa isa>
uint8_t* encode_heads(const Part& part, int32_t stream, const uint8_t* row, float bins, Encoder* state, uint8_t* steps,
                      uint8_t* sizes, uint8_t* at, uint8_t* end) {
  const size_t escapes_before = state->escapes.size();
  state->kinds.clear();
  for (int32_t head = part.first_head(stream); head < part.end_head(stream); ++head) {
    store(steps + 4 * head, encode_head(part, head, row, bins, state));
  }
  const auto escape_bytes = static_cast<int64_t>(4 * state->escapes.size());
  if (end - at < escape_bytes) return nullptr;
  uint8_t* const words = encode_stream<isa>(*state, part.tokens(), at, end - escape_bytes);
  if (words == nullptr) return nullptr;
  const int64_t bytes = end - escape_bytes - words;
  store(sizes, static_cast<uint32_t>(state->escapes.size() - escapes_before));
  store(sizes + 4, static_cast<uint32_t>(bytes));
  std::memmove(at, words, static_cast<size_t>(bytes));
  return at + bytes;
}

// Writes the body of a part at `out`; returns its length or a Refusal.
template <rans::Isa isa>
int64_t encode_part(const Part& part, const uint8_t* row, float bins, Encoder* state, uint8_t* out, uint8_t* end) {
  if (end - out < part.fixed_bytes()) return kNoRoom;
  state->escapes.clear();
  uint8_t* at = out + part.fixed_bytes();
  for (int32_t stream = 0; stream < part.streams(); ++stream) {
    uint8_t* const sizes = out + part.sizes_at() + 8 * stream;
    at = encode_heads<isa>(part, stream, row, bins, state, out, sizes, at, end);
    if (at == nullptr) return kNoRoom;
  }
  for (int64_t line = 0; line < part.lines(); ++line) {
    out[part.kinds_at() + line] = state->lines[static_cast<size_t>(line)].kind;
    store(out + part.means_at() + 2 * line, state->lines[static_cast<size_t>(line)].mean);
  }
  const auto escape_bytes = static_cast<int64_t>(4 * state->escapes.size());
  if (escape_bytes > 0) std::memcpy(at, state->escapes.data(), static_cast<size_t>(escape_bytes));
  return at + escape_bytes - out;
}

// ---- decoding

struct Decoder {
  Index index;  // of the part
  std::vector<float> x;
  std::vector<int32_t> q;  // (dim, tokens) of a head
  std::vector<uint8_t> symbols;
  std::vector<int32_t> order;
};

// q[0, tokens) of a line from its symbols; escapes count as symbols like others. Sums wrap around on made-up residuals.
void add_up(const uint8_t* symbols, int64_t tokens, bool delta, int32_t mean, int32_t* q) {
  if (!delta) {
    for (int64_t t = 0; t < tokens; ++t) q[t] = mean + symbols[t] - kReach;
    return;
  }
  auto last = static_cast<uint32_t>(mean);
  for (int64_t t = 0; t < tokens; ++t) {
    last += symbols[t] - static_cast<uint32_t>(kReach);
    q[t] = static_cast<int32_t>(last);
  }
}

const uint8_t* find_escape(const uint8_t* symbols, const uint8_t* end) {
  return static_cast<const uint8_t*>(std::memchr(symbols, kEscape, static_cast<size_t>(end - symbols)));
}

// Puts right what add_up has made of escapes; false where they run out. A few stand far from each other in most lines.
bool put_right(const uint8_t* symbols, int64_t tokens, bool delta, const uint8_t** escapes, const uint8_t* end,
               int32_t* q) {
  uint32_t missing = 0;  // from the token `done` on, where differences add up
  int64_t done = 0;
  const auto add_until = [&](int64_t t) {
    for (; done < t; ++done) q[done] = static_cast<int32_t>(static_cast<uint32_t>(q[done]) + missing);
  };
  const uint8_t* const last = symbols + tokens;
  for (const uint8_t* at = find_escape(symbols, last); at != nullptr; at = find_escape(at + 1, last)) {
    if (end - *escapes < 4) return false;
    const uint32_t error = load<uint32_t>(*escapes) - static_cast<uint32_t>(kEscape - kReach);
    *escapes += 4;
    if (delta) {
      add_until(at - symbols);
      missing += error;
    } else {
      q[at - symbols] = static_cast<int32_t>(static_cast<uint32_t>(q[at - symbols]) + error);
    }
  }
  if (missing != 0) add_until(tokens);
  return true;
}

bool decode_line(const uint8_t* symbols, int64_t tokens, uint8_t kind, int32_t mean, const uint8_t** escapes,
                 const uint8_t* end, int32_t* q) {
  const bool delta = (kind & kDelta) != 0;
  add_up(symbols, tokens, delta, mean, q);
  return put_right(symbols, tokens, delta, escapes, end, q);
}

// Fills the heads of one stream of a part from [stream, stream + bytes) and from escapes, which it moves on.
bool decode_heads(const Part& part, int32_t which, const uint8_t* body, const uint8_t* stream, int64_t bytes,
                  const uint8_t** escapes, const uint8_t* escapes_end, rans::Isa isa, Decoder* state, uint8_t* row) {
  rans::Reader reader;
  if (!rans::open(stream, bytes, &reader)) return false;
  const int64_t tokens = part.tokens();
  for (int32_t head = part.first_head(which); head < part.end_head(which); ++head) {
    const uint8_t* kind = body + part.kinds_at() + head * part.dim;
    const uint8_t* means = body + part.means_at() + 2 * (static_cast<int64_t>(head) * part.dim);
    order_lines(part.dim, [&](int32_t d) { return kind[d]; }, &state->order);
    for (const int32_t d : state->order) {
      const rans::DecodeTable& table = models().decode[kind[d] & ~kDelta];
      if (!rans::decode_from(&reader, table, state->symbols.data(), tokens, isa)) return false;
      int32_t* const q = state->q.data() + d * tokens;
      const auto mean = load<int16_t>(means + 2 * d);
      if (!decode_line(state->symbols.data(), tokens, kind[d], mean, escapes, escapes_end, q)) return false;
    }
    const float step = tame(load<float>(body + 4 * head));
    const auto restored = [&](int32_t q) { return tame(static_cast<float>(q) * step); };
    transpose(state->q.data(), part.dim, tokens, restored, state->x.data());
    store_head(part, state->index, head, state->x.data(), row);
  }
  return rans::at_end(reader);
}

bool decode_part(const Part& part, const uint8_t* body, int64_t bytes, rans::Isa isa, Decoder* state, uint8_t* row) {
  if (bytes < part.fixed_bytes()) return false;
  const uint8_t* const sizes = body + part.sizes_at();
  int64_t total = part.fixed_bytes(), num_escapes = 0;
  for (int32_t stream = 0; stream < part.streams(); ++stream) {
    num_escapes += load<uint32_t>(sizes + 8 * stream);
    total += load<uint32_t>(sizes + 8 * stream + 4);
  }
  if (total + 4 * num_escapes != bytes) return false;
  for (int64_t line = 0; line < part.lines(); ++line) {
    if ((body[part.kinds_at() + line] & ~kDelta) >= kClasses) return false;
  }
  const uint8_t* at = body + part.fixed_bytes();
  const uint8_t* escapes = body + total;
  for (int32_t stream = 0; stream < part.streams(); ++stream) {
    const uint8_t* const end = escapes + 4 * static_cast<int64_t>(load<uint32_t>(sizes + 8 * stream));
    const int64_t stream_bytes = load<uint32_t>(sizes + 8 * stream + 4);
    if (!decode_heads(part, stream, body, at, stream_bytes, &escapes, end, isa, state, row)) return false;
    if (escapes != end) return false;
    at += stream_bytes;
  }
  return true;
}

// Writes the payload of a row to out[0, out_bytes); returns its length or a Refusal.
template <rans::Isa isa>
int64_t encode_row(const kvx_layout& layout, const float* bins, const uint8_t* row, uint8_t* out, int64_t out_bytes) {
  if (out_bytes < directory_end(layout)) return kNoRoom;
  const auto dim = static_cast<size_t>(std::max(layout.k_dim, layout.v_dim));
  const auto tokens = static_cast<size_t>(tokens_of(layout));
  Encoder state;
  state.x.resize(tokens * dim), state.q.resize(tokens * dim);
  state.mean.resize(dim), state.square.resize(dim);
  state.lines.resize(static_cast<size_t>(layout.heads) * dim);
  state.symbols.resize(static_cast<size_t>(stream_heads(layout)) * tokens * dim);
  write_header(layout, kVersion, stream_heads(layout), out);
  uint8_t* body = out + directory_end(layout);
  for (int64_t i = 0; i < 2 * layout.layers; ++i) {
    const Part part = part_of(layout, stream_heads(layout), i);
    state.index = index_of(layout, i % 2 == 0);
    const int64_t bytes = encode_part<isa>(part, row, bins[i], &state, body, out + out_bytes);
    if (bytes < 0) return bytes;
    store(out + kHeaderBytes + 4 * i, static_cast<uint32_t>(bytes));
    body += bytes;
  }
  return body - out;
}

int64_t decode_row(const kvx_layout& layout, const uint8_t* coded, int64_t coded_bytes, rans::Isa isa, uint8_t* row) {
  const int64_t heads = read_header(layout, coded, coded_bytes);
  if (heads < 0) return heads;
  int64_t total = directory_end(layout);
  for (int64_t i = 0; i < 2 * layout.layers; ++i) total += load<uint32_t>(coded + kHeaderBytes + 4 * i);
  if (total != coded_bytes) return kBadDirectory;
  const auto tokens = static_cast<size_t>(tokens_of(layout));
  const auto dim = static_cast<size_t>(std::max(layout.k_dim, layout.v_dim));
  Decoder state;
  state.x.resize(tokens * dim), state.q.resize(tokens * dim), state.symbols.resize(tokens);
  const uint8_t* body = coded + directory_end(layout);
  for (int64_t i = 0; i < 2 * layout.layers; ++i) {
    const int64_t bytes = load<uint32_t>(coded + kHeaderBytes + 4 * i);
    const Part part = part_of(layout, static_cast<int32_t>(heads), i);
    state.index = index_of(layout, i % 2 == 0);
    if (!decode_part(part, body, bytes, isa, &state, row)) return kBadBody;
    body += bytes;
  }
  return 0;
}

rans::Isa chosen(int32_t isa) { return isa == 0 ? rans::best_isa() : static_cast<rans::Isa>(isa); }

}  // namespace

// Raised with every change of the interface below; ops/cachegen.py refuses another.
KVX_EXPORT int32_t kvx_cachegen_abi() { return 3; }

// The best instruction set of this machine, as rans::Isa.
KVX_EXPORT int32_t kvx_cachegen_isa() { return static_cast<int32_t>(rans::best_isa()); }

// Writes the payload of a row to out[0, out_bytes); returns its length or a Refusal. `bins` holds two numbers for each
// layer, of its keys and of its values: how many steps cover kSpread standard deviations. `isa` is a rans::Isa.
KVX_EXPORT int64_t kvx_cachegen_encode(const kvx_layout* layout, const float* bins, const uint8_t* row, uint8_t* out,
                                       int64_t out_bytes, int32_t isa) {
  return machine::on(chosen(isa), [&](auto set) { return encode_row<set>(*layout, bins, row, out, out_bytes); });
}

// Fills the elements of a row from a payload, and only them; returns 0 or a Refusal. Whatever the payload holds, it reads
// and writes within both.
KVX_EXPORT int64_t kvx_cachegen_decode(const kvx_layout* layout, const uint8_t* coded, int64_t coded_bytes, uint8_t* row,
                                       int32_t isa) {
  return machine::on(chosen(isa), [&](auto set) { return decode_row(*layout, coded, coded_bytes, set, row); });
}
