// Rows to payloads of cachegen on a GPU, in stages of which each is one launch; bit for bit what cachegen.cpp writes.
//
//     measure    slabs      how far elements lie from their line's mean
//     quantise   slabs      steps, kinds, means, symbols; how many escapes
//     fold       streams    symbols to words, from the last to the first
//     put        chunks     where everything goes, the header, the directory; whether there is room
//     copy       streams    words into the payload
//     describe   slabs      what comes before the words, and the escapes behind them

#pragma once

#include <cmath>

#include "cachegen_job.h"

namespace kvx {
namespace cachegen {

// The lane's line of a slab, and what is known of it.
struct Slab {
  View view;
  Part part;
  Place at;
  int64_t first;  // line of the head's first element, in the chunk

  KVX_DEVICE int32_t element(int lane) const { return at.slab * warp::kLanes + lane; }
  KVX_DEVICE int64_t line(int lane) const { return first + element(lane); }
  KVX_DEVICE int64_t head() const { return at.part * part.layout->heads + at.head; }
};

KVX_DEVICE Slab slab_of(const Job& job, int64_t item, int32_t stream_heads) {
  const Place at = place_of(job, item, slabs_of_head(job.layout));
  const Part part = part_of(job.layout, stream_heads, at.part);
  const int64_t first = first_line(job.layout, at.part) + static_cast<int64_t>(at.head) * part.dim;
  return {view_of(job, at.chunk), part, at, first};
}

struct Measure {
  static constexpr int kWarps = 4;  // of a block of threads
  struct Shared {};

  static KVX_DEVICE int64_t items(const Job& job) { return num_heads(job) * slabs_of_head(job.layout); }

  static KVX_DEVICE void run(const Job& job, int64_t item, Shared*) {
    const Slab slab = slab_of(job, item, job.layout.heads);
    const uint8_t* const row = slab.view.chunk->row;
    warp::each([&](int lane) {
      const int32_t d = slab.element(lane);
      if (d >= slab.part.dim) return;
      float mean = 0.0f, square = 0.0f;
      each_token(slab.part, slab.at.head, d, [&](int64_t, int64_t cell, int32_t index) {
        mean += load_element(job.layout, row + cell, index);
      });
      mean /= static_cast<float>(slab.part.tokens());
      each_token(slab.part, slab.at.head, d, [&](int64_t, int64_t cell, int32_t index) {
        const float away = load_element(job.layout, row + cell, index) - mean;
        square += away * away;
      });
      slab.view.scratch.squares[slab.line(lane)] = square;
    });
  }
};

// Sums run along lines, as on hosts, so that every machine rounds alike.
KVX_DEVICE float deviation(const Slab& slab) {
  const float* const squares = slab.view.scratch.squares + slab.first;
  float sum = 0.0f;
  for (int32_t d = 0; d < slab.part.dim; ++d) sum += squares[d];
  return std::sqrt(tame(sum) / static_cast<float>(slab.part.tokens() * slab.part.dim));
}

// Calls take(t, residual) for the tokens of a line.
template <typename Take>
KVX_DEVICE void each_residual(const Slab& slab, int32_t d, float inverse, int32_t mean, bool delta, const Take& take) {
  const kvx_layout& layout = *slab.part.layout;
  const uint8_t* const row = slab.view.chunk->row;
  int32_t last = mean;
  each_token(slab.part, slab.at.head, d, [&](int64_t t, int64_t cell, int32_t index) {
    const int32_t q = quantise(load_element(layout, row + cell, index), inverse);
    take(t, q - last);
    if (delta) last = q;
  });
}

KVX_DEVICE uint8_t symbol_of(int32_t residual, const rans::Model& model) {
  const auto symbol = static_cast<uint32_t>(residual + kReach);
  return symbol < kEscape && model.frequency[symbol] != 0 ? static_cast<uint8_t>(symbol) : kEscape;
}

struct Quantise {
  static constexpr int kWarps = 4;
  struct Shared {};

  static KVX_DEVICE int64_t items(const Job& job) { return num_heads(job) * slabs_of_head(job.layout); }

  static KVX_DEVICE int64_t magnitudes(const Slab& slab, int32_t d, float inverse, int32_t mean, bool delta) {
    int64_t sum = 0;
    each_residual(slab, d, inverse, mean, delta, [&](int64_t, int32_t residual) {
      sum += residual < 0 ? -static_cast<int64_t>(residual) : residual;
    });
    return sum;
  }

  // Four symbols at a time: lines lie behind each other, and lanes are lines.
  static KVX_DEVICE uint32_t write_symbols(const Slab& slab, int32_t d, float inverse, int32_t mean, bool delta,
                                           const rans::Model& model, uint8_t* out) {
    const int64_t last = slab.part.tokens() - 1;
    uint32_t escapes = 0, packed = 0;
    each_residual(slab, d, inverse, mean, delta, [&](int64_t t, int32_t residual) {
      const uint32_t symbol = symbol_of(residual, model);
      escapes += symbol == kEscape;
      packed = packed >> 8 | symbol << 24;
      if (t % 4 == 3) store_aligned(out + t - 3, packed);
      if (t == last && t % 4 != 3) store_aligned(out + t - t % 4, packed >> (24 - t % 4 * 8));
    });
    return escapes;
  }

  static KVX_DEVICE void run(const Job& job, int64_t item, Shared*) {
    const Slab slab = slab_of(job, item, job.layout.heads);
    const Scratch& scratch = slab.view.scratch;
    const int64_t tokens = slab.part.tokens();
    const float step = step_of(deviation(slab), job.bins[slab.at.part]);
    const float inverse = inverse_of(step);
    warp::each([&](int lane) {
      const int32_t d = slab.element(lane);
      if (d == 0) scratch.steps[slab.head()] = step;
      if (d >= slab.part.dim) return;
      int64_t sum = 0;
      each_residual(slab, d, inverse, 0, false, [&](int64_t, int32_t q) { sum += q; });
      const int32_t mean = mean_of(sum, tokens);
      const int64_t from_mean = magnitudes(slab, d, inverse, mean, false);
      const int64_t from_last = magnitudes(slab, d, inverse, mean, true);
      const bool delta = from_last < from_mean;
      const int k = class_of(delta ? from_last : from_mean, tokens);
      const int64_t line = slab.line(lane);
      scratch.means[line] = static_cast<int16_t>(mean);
      scratch.kinds[line] = static_cast<uint8_t>(k | (delta ? kDelta : 0));
      scratch.escapes[line] = write_symbols(slab, d, inverse, mean, delta, job.models->model[k],
                                            scratch.symbols + line * scratch.symbol_stride);
    });
  }
};

struct Fold {
  static constexpr int kWarps = 1;
  struct alignas(16) Shared {
    rans::EncodeEntry entries[rans::kMaxSymbols];
  };

  static KVX_DEVICE int64_t items(const Job& job) { return num_heads(job); }

  // Codes up to 32 symbols, whose words end at `end`; returns where they begin.
  static KVX_DEVICE uint16_t* code(const warp::Lanes<uint32_t>& symbols, int32_t count, const rans::EncodeEntry* entries,
                                   warp::Lanes<uint32_t>* states, uint16_t* end) {
    warp::Lanes<bool> full;
    warp::each([&](int lane) { full[lane] = lane < count && (*states)[lane] >= entries[symbols[lane]].limit; });
    const uint32_t mask = warp::ballot(full);
    uint16_t* const begin = end - warp::count(mask);
    warp::each([&](int lane) {
      if (lane >= count) return;
      const rans::EncodeEntry entry = entries[symbols[lane]];
      uint32_t x = (*states)[lane];
      if (full[lane]) {
        begin[warp::rank(mask, lane)] = static_cast<uint16_t>(x);
        x >>= 16;
      }
      // the high half of x * reciprocal
      const uint64_t low = (x * (entry.reciprocal & 0xffffffff)) >> 32;
      const auto quotient = static_cast<uint32_t>((x * (entry.reciprocal >> 32) + low) >> 32);
      (*states)[lane] = x + entry.bias + quotient * entry.complement;
    });
    return begin;
  }

  // Codes the symbols of a line from the last to the first; groups of eight times 32 are read before they are coded.
  static KVX_DEVICE uint16_t* code_line(const uint8_t* line, int64_t tokens, const rans::EncodeEntry* entries,
                                        warp::Lanes<uint32_t>* states, uint16_t* end) {
    constexpr int kAhead = 8;
    const int64_t groups = (tokens + warp::kLanes - 1) / warp::kLanes;
    for (int64_t first = (groups - 1) / kAhead * kAhead; first >= 0; first -= kAhead) {
      warp::Lanes<uint32_t> held[kAhead];
      KVX_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        const int64_t begin = (first + i) * warp::kLanes;
        warp::each([&](int lane) { held[i][lane] = begin + lane < tokens ? line[begin + lane] : 0; });
      }
      KVX_UNROLL
      for (int i = kAhead - 1; i >= 0; --i) {
        const int64_t left = tokens - (first + i) * warp::kLanes;
        if (left <= 0) continue;
        end = code(held[i], static_cast<int32_t>(left < warp::kLanes ? left : warp::kLanes), entries, states, end);
      }
    }
    return end;
  }

  // Codes a head's lines backwards.
  static KVX_DEVICE uint16_t* code_head(const View& view, int64_t first, int32_t dim, Shared* shared,
                                        warp::Lanes<uint32_t>* states, uint16_t* end) {
    const Scratch& scratch = view.scratch;
    int brought = -1;
    for (int32_t i = dim - 1; i >= 0; --i) {
      const int64_t line = first + scratch.order[first + i];
      const int k = scratch.kinds[line] & ~kDelta;
      if (k != brought) bring(view.job->models->encode[k], sizeof(shared->entries), shared->entries);
      brought = k;
      const uint8_t* const symbols = scratch.symbols + line * scratch.symbol_stride;
      end = code_line(symbols, tokens_of(view.job->layout), shared->entries, states, end);
    }
    return end;
  }

  // Makes of how many escapes each line has how many its stream has before it; returns how many there are.
  static KVX_DEVICE int64_t add_escapes(const Scratch& scratch, int64_t first, int32_t dim, int64_t before) {
    for (int32_t begin = 0; begin < dim; begin += warp::kLanes) {
      warp::Lanes<int64_t> counts;
      warp::each([&](int lane) {
        const int32_t i = begin + lane;
        counts[lane] = i < dim ? scratch.escapes[first + scratch.order[first + i]] : 0;
      });
      int64_t total = 0;
      const warp::Lanes<int64_t> others = warp::sum_before(counts, &total);
      warp::each([&](int lane) {
        const int32_t i = begin + lane;
        if (i < dim) scratch.escapes[first + scratch.order[first + i]] = static_cast<uint32_t>(before + others[lane]);
      });
      before += total;
    }
    return before;
  }

  static KVX_DEVICE void run(const Job& job, int64_t item, Shared* shared) {
    const Place at = place_of(job, item, 1);
    const Part part = part_of(job.layout, stream_heads(job.layout), at.part);
    const int32_t stream = at.head;
    if (stream >= part.streams()) return;
    const View view = view_of(job, at.chunk);
    const int64_t part_line = first_line(job.layout, at.part);
    int64_t escapes = 0;
    for (int32_t head = part.first_head(stream); head < part.end_head(stream); ++head) {
      const int64_t first = part_line + static_cast<int64_t>(head) * part.dim;
      order_lines(view.scratch.kinds + first, part.dim, view.scratch.order + first);
      escapes = add_escapes(view.scratch, first, part.dim, escapes);
    }
    warp::Lanes<uint32_t> states;
    warp::each([&](int lane) { states[lane] = rans::kLow; });
    uint16_t* const end = view.scratch.words + words_end(part, at.part, stream);
    uint16_t* begin = end;
    for (int32_t head = part.end_head(stream) - 1; head >= part.first_head(stream); --head) {
      begin = code_head(view, part_line + static_cast<int64_t>(head) * part.dim, part.dim, shared, &states, begin);
    }
    begin -= 2 * warp::kLanes;
    warp::each([&](int lane) {
      begin[2 * lane] = static_cast<uint16_t>(states[lane]);
      begin[2 * lane + 1] = static_cast<uint16_t>(states[lane] >> 16);
      if (lane != 0) return;
      Sizes& sizes = view.scratch.sizes[at.part * job.layout.heads + stream];
      sizes = {static_cast<uint32_t>(escapes), static_cast<uint32_t>(2 * (end - begin))};
    });
  }
};

struct Put {
  static constexpr int kWarps = 1;
  struct Shared {};

  static KVX_DEVICE int64_t items(const Job& job) { return job.count; }

  // The length of a body; where its streams and their escapes begin in it.
  static KVX_DEVICE int64_t lay_out(const Part& part, const Sizes* sizes, Sizes* places) {
    int64_t at = part.fixed_bytes();
    for (int32_t stream = 0; stream < part.streams(); ++stream) {
      places[stream].bytes = static_cast<uint32_t>(at);
      at += sizes[stream].bytes;
    }
    for (int32_t stream = 0; stream < part.streams(); ++stream) {
      places[stream].escapes = static_cast<uint32_t>(at);
      at += 4 * static_cast<int64_t>(sizes[stream].escapes);
    }
    return at;
  }

  static KVX_DEVICE void write_directory(const View& view, int64_t end) {
    const kvx_layout& layout = view.job->layout;
    if (end > view.chunk->payload_bytes) {
      *view.result = kNoRoom;
      return;
    }
    uint8_t* const out = view.chunk->payload;
    write_header(layout, kVersion, stream_heads(layout), out);
    const int64_t* const begins = view.scratch.begins;
    for (int64_t part = 0; part < num_parts(layout); ++part) {
      store(out + kHeaderBytes + 4 * part, static_cast<uint32_t>(begins[part + 1] - begins[part]));
    }
    *view.result = end;
  }

  static KVX_DEVICE void run(const Job& job, int64_t item, Shared*) {
    const View view = view_of(job, item);
    const Scratch& scratch = view.scratch;
    const int64_t parts = num_parts(job.layout);
    int64_t end = directory_end(job.layout);
    for (int64_t first = 0; first < parts; first += warp::kLanes) {
      warp::Lanes<int64_t> bytes;
      warp::each([&](int lane) {
        const int64_t number = first + lane;
        bytes[lane] = 0;
        if (number >= parts) return;
        const Part part = part_of(job.layout, stream_heads(job.layout), number);
        const int64_t heads = number * job.layout.heads;
        bytes[lane] = lay_out(part, scratch.sizes + heads, scratch.places + heads);
      });
      int64_t total = 0;
      const warp::Lanes<int64_t> before = warp::sum_before(bytes, &total);
      warp::each([&](int lane) {
        if (first + lane < parts) scratch.begins[first + lane] = end + before[lane];
      });
      end += total;
    }
    warp::each([&](int lane) {
      if (lane == 0) scratch.begins[parts] = end;
    });
    warp::meet();
    warp::each([&](int lane) {
      if (lane == 0) write_directory(view, end);
    });
  }
};

struct Copy {
  static constexpr int kWarps = 4;
  static constexpr int32_t kShare = 8;  // warps of one stream
  struct Shared {};

  static KVX_DEVICE int64_t items(const Job& job) { return num_heads(job) * kShare; }

  static KVX_DEVICE void run(const Job& job, int64_t item, Shared*) {
    const Place at = place_of(job, item, kShare);
    const View view = view_of(job, at.chunk);
    const Part part = part_of(job.layout, stream_heads(job.layout), at.part);
    if (at.head >= part.streams() || *view.result < 0) return;
    const int64_t number = at.part * job.layout.heads + at.head;
    const int64_t bytes = view.scratch.sizes[number].bytes;
    const auto* from = reinterpret_cast<const uint8_t*>(view.scratch.words + words_end(part, at.part, at.head)) - bytes;
    uint8_t* to = view.chunk->payload + view.scratch.begins[at.part] + view.scratch.places[number].bytes;
    warp::each([&](int lane) {
      for (int64_t i = at.slab * warp::kLanes + lane; i < bytes; i += kShare * warp::kLanes) to[i] = from[i];
    });
  }
};

struct Describe {
  static constexpr int kWarps = 4;
  struct Shared {};

  static KVX_DEVICE int64_t items(const Job& job) { return num_heads(job) * slabs_of_head(job.layout); }

  static KVX_DEVICE void write_escapes(const Slab& slab, int32_t d, uint8_t* out) {
    const Scratch& scratch = slab.view.scratch;
    const int64_t line = slab.first + d;
    const rans::Model& model = slab.view.job->models->model[scratch.kinds[line] & ~kDelta];
    const float inverse = inverse_of(scratch.steps[slab.head()]);
    const bool delta = (scratch.kinds[line] & kDelta) != 0;
    each_residual(slab, d, inverse, scratch.means[line], delta, [&](int64_t, int32_t residual) {
      if (symbol_of(residual, model) != kEscape) return;
      store(out, residual);
      out += 4;
    });
  }

  static KVX_DEVICE void run(const Job& job, int64_t item, Shared*) {
    const Slab slab = slab_of(job, item, stream_heads(job.layout));
    const Part& part = slab.part;
    const Scratch& scratch = slab.view.scratch;
    if (*slab.view.result < 0) return;
    uint8_t* const body = slab.view.chunk->payload + scratch.begins[slab.at.part];
    const int32_t stream = slab.at.head / part.stream_heads;
    const int64_t number = slab.at.part * job.layout.heads + stream;
    warp::each([&](int lane) {
      const int32_t d = slab.element(lane);
      if (d == 0) store(body + 4 * slab.at.head, scratch.steps[slab.head()]);
      if (d == 0 && slab.at.head == part.first_head(stream)) {
        store(body + part.sizes_at() + 8 * stream, scratch.sizes[number].escapes);
        store(body + part.sizes_at() + 8 * stream + 4, scratch.sizes[number].bytes);
      }
      if (d >= part.dim) return;
      const int64_t in_part = static_cast<int64_t>(slab.at.head) * part.dim + d;
      body[part.kinds_at() + in_part] = scratch.kinds[slab.line(lane)];
      store(body + part.means_at() + 2 * in_part, scratch.means[slab.line(lane)]);
      if (scratch.sizes[number].escapes == 0) return;
      const int64_t before = scratch.escapes[slab.line(lane)];
      write_escapes(slab, d, body + scratch.places[number].escapes + 4 * before);
    });
  }
};

// Runs every stage; `launch` takes one and returns 0 or an error code.
template <typename Launch>
int64_t encode(const Job& job, const Launch& launch) {
  int64_t error = launch(job, Measure());
  if (error == 0) error = launch(job, Quantise());
  if (error == 0) error = launch(job, Fold());
  if (error == 0) error = launch(job, Put());
  if (error == 0) error = launch(job, Copy());
  if (error == 0) error = launch(job, Describe());
  return error;
}

}  // namespace cachegen
}  // namespace kvx
