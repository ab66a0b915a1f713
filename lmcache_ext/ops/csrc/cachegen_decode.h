// Payloads of cachegen to rows on a GPU, in stages of which each is one launch; bit for bit what cachegen.cpp reads.
//
//     inspect    chunks     the header, the directory
//     unfold     streams    words to symbols
//     restore    slabs      symbols to elements, of chunks with which nothing was wrong
//
// Whatever a payload holds, nothing is read or written outside it, the scratch and the row; the row of one that is
// refused stays as it was.

#pragma once

#include "cachegen_job.h"

namespace kvx {
namespace cachegen {

struct Inspect {
  static constexpr int kWarps = 1;
  struct Shared {};

  static KVX_DEVICE int64_t items(const Job& job) { return job.count; }

  static KVX_DEVICE int64_t read_directory(const View& view) {
    const kvx_layout& layout = view.job->layout;
    const uint8_t* const coded = view.chunk->payload;
    const int64_t heads = read_header(layout, coded, view.chunk->payload_bytes);
    if (heads < 0) return heads;
    *view.scratch.stream_heads = static_cast<int32_t>(heads);
    int64_t at = directory_end(layout);
    for (int64_t part = 0; part < num_parts(layout); ++part) {
      view.scratch.begins[part] = at;
      at += load<uint32_t>(coded + kHeaderBytes + 4 * part);
    }
    view.scratch.begins[num_parts(layout)] = at;
    return at == view.chunk->payload_bytes ? 0 : static_cast<int64_t>(kBadDirectory);
  }

  static KVX_DEVICE void run(const Job& job, int64_t item, Shared*) {
    const View view = view_of(job, item);
    warp::each([&](int lane) {
      if (lane == 0) *view.result = read_directory(view);
    });
  }
};

// The words of a stream: 64 of them are held, so that a group of lanes takes its words without waiting for memory.
struct Words {
  const uint8_t* stream;
  int64_t next;    // word that is the first not held
  int64_t total;   // words of the stream
  int64_t unread;  // words that no lane has taken
  int taken;       // words of `first` that lanes have taken
  warp::Lanes<uint32_t> first, second;

  KVX_DEVICE void hold(warp::Lanes<uint32_t>* words) {
    warp::each([&](int lane) {
      (*words)[lane] = next + lane < total ? load<uint16_t>(stream + 2 * (next + lane)) : 0;
    });
    next += warp::kLanes;
  }

  KVX_DEVICE void open(const uint8_t* words, int64_t count) {
    stream = words, next = 0, total = unread = count, taken = 0;
    hold(&first);
    hold(&second);
  }

  // Gives each lane of the mask a word, which its state takes in; the caller has seen that there are enough.
  KVX_DEVICE void give(uint32_t mask, warp::Lanes<uint32_t>* states) {
    warp::Lanes<int> place;
    warp::each([&](int lane) { place[lane] = taken + warp::rank(mask, lane); });
    const warp::Lanes<uint32_t> early = warp::shuffle(first, place), late = warp::shuffle(second, place);
    warp::each([&](int lane) {
      if ((mask >> lane & 1) == 0) return;
      (*states)[lane] = (*states)[lane] << 16 | (place[lane] < warp::kLanes ? early[lane] : late[lane]);
    });
    unread -= warp::count(mask);
    taken += warp::count(mask);
    if (taken < warp::kLanes) return;
    taken -= warp::kLanes;
    first = second;
    hold(&second);
  }
};

struct Unfold {
  static constexpr int kWarps = 1;
  struct alignas(16) Shared {
    rans::DecodeTable table;
  };

  static KVX_DEVICE int64_t items(const Job& job) { return num_heads(job); }

  // Where a stream and its escapes are; false where sizes do not add up or a class is none.
  static KVX_DEVICE bool find(const Part& part, const uint8_t* body, int64_t bytes, int32_t stream, Sizes* sizes,
                              int64_t* words_at, int64_t* escapes_before) {
    if (bytes < part.fixed_bytes()) return false;
    int64_t at = part.fixed_bytes(), escapes = 0;
    for (int32_t i = 0; i < part.streams(); ++i) {
      const uint8_t* const field = body + part.sizes_at() + 8 * i;
      const Sizes found = {load<uint32_t>(field), load<uint32_t>(field + 4)};
      if (i == stream) *sizes = found, *words_at = at, *escapes_before = escapes;
      at += found.bytes;
      escapes += found.escapes;
    }
    if (at + 4 * escapes != bytes || sizes->bytes < rans::kStateBytes || sizes->bytes % 2 != 0) return false;
    warp::Lanes<bool> bad;
    warp::each([&](int lane) {
      bad[lane] = false;
      const int64_t end = static_cast<int64_t>(part.end_head(stream)) * part.dim;
      for (int64_t i = static_cast<int64_t>(part.first_head(stream)) * part.dim + lane; i < end; i += warp::kLanes) {
        bad[lane] = bad[lane] || (body[part.kinds_at() + i] & ~kDelta) >= kClasses;
      }
    });
    return warp::ballot(bad) == 0;
  }

  // Up to 32 symbols; false where the words run out.
  static KVX_DEVICE bool decode(const rans::DecodeTable& table, int64_t count, Words* words,
                                warp::Lanes<uint32_t>* states, warp::Lanes<uint8_t>* symbols) {
    warp::Lanes<bool> low;
    warp::each([&](int lane) {
      low[lane] = false;
      if (lane >= count) return;
      uint32_t& state = (*states)[lane];
      const uint32_t entry = table.slot[state & (rans::kTotal - 1)];
      state = (entry >> 20) * (state >> rans::kBits) + (entry >> 8 & (rans::kTotal - 1));
      (*symbols)[lane] = static_cast<uint8_t>(entry);
      low[lane] = state < rans::kLow;
    });
    const uint32_t mask = warp::ballot(low);
    if (warp::count(mask) > words->unread) return false;
    words->give(mask, states);
    return true;
  }

  // The symbols of one line; how many of them are escapes, or -1 where the words run out.
  static KVX_DEVICE int64_t decode_line(const rans::DecodeTable& table, int64_t tokens, Words* words,
                                        warp::Lanes<uint32_t>* states, uint8_t* out) {
    int64_t escapes = 0;
    for (int64_t first = 0; first < tokens; first += warp::kLanes) {
      const int64_t count = tokens - first;
      warp::Lanes<uint8_t> symbols;
      warp::Lanes<bool> escaped;
      if (!decode(table, count, words, states, &symbols)) return -1;
      warp::each([&](int lane) {
        escaped[lane] = lane < count && symbols[lane] == kEscape;
        if (lane < count) out[first + lane] = symbols[lane];
      });
      escapes += warp::count(warp::ballot(escaped));
    }
    return escapes;
  }

  // Decodes a head's lines and notes how many escapes come before each; how many there are then, or -1.
  static KVX_DEVICE int64_t decode_head(const View& view, const uint8_t* kinds, int64_t first, int32_t dim,
                                        int64_t escapes, Shared* shared, Words* words, warp::Lanes<uint32_t>* states) {
    const Scratch& scratch = view.scratch;
    order_lines(kinds, dim, scratch.order + first);
    int brought = -1;
    for (int32_t i = 0; i < dim; ++i) {
      const int32_t d = scratch.order[first + i];
      const int k = kinds[d] & ~kDelta;
      if (k != brought) bring(&view.job->models->decode[k], sizeof(shared->table), &shared->table);
      brought = k;
      warp::each([&](int lane) {
        if (lane == 0) scratch.escapes[first + d] = static_cast<uint32_t>(escapes);
      });
      uint8_t* const out = scratch.symbols + (first + d) * scratch.symbol_stride;
      const int64_t found = decode_line(shared->table, tokens_of(view.job->layout), words, states, out);
      if (found < 0) return -1;
      escapes += found;
    }
    return escapes;
  }

  static KVX_DEVICE bool decode_stream(const View& view, const Part& part, int64_t number, int32_t stream,
                                       Shared* shared) {
    const int64_t begin = view.scratch.begins[number];
    const uint8_t* const body = view.chunk->payload + begin;
    Sizes sizes = {};
    int64_t at = 0, escapes = 0;
    if (!find(part, body, view.scratch.begins[number + 1] - begin, stream, &sizes, &at, &escapes)) return false;
    const int64_t escapes_end = escapes + sizes.escapes;
    warp::Lanes<uint32_t> states;
    warp::each([&](int lane) { states[lane] = load<uint32_t>(body + at + 4 * lane); });
    Words words;
    words.open(body + at + rans::kStateBytes, (sizes.bytes - rans::kStateBytes) / 2);
    for (int32_t head = part.first_head(stream); head < part.end_head(stream); ++head) {
      const int64_t first = static_cast<int64_t>(head) * part.dim;
      escapes = decode_head(view, body + part.kinds_at() + first, first_line(*part.layout, number) + first, part.dim,
                            escapes, shared, &words, &states);
      if (escapes < 0) return false;
    }
    warp::Lanes<bool> astray;
    warp::each([&](int lane) { astray[lane] = states[lane] != rans::kLow; });
    return warp::ballot(astray) == 0 && words.unread == 0 && escapes == escapes_end;
  }

  static KVX_DEVICE void run(const Job& job, int64_t item, Shared* shared) {
    const Place at = place_of(job, item, 1);
    const View view = view_of(job, at.chunk);
    if (warp::of_first(*view.result) < 0) return;  // another stream may say so just now
    const Part part = part_of(job.layout, *view.scratch.stream_heads, at.part);
    if (at.head >= part.streams()) return;
    const bool sound = decode_stream(view, part, at.part, at.head, shared);
    warp::each([&](int lane) {
      if (lane == 0 && !sound) *view.result = kBadBody;
    });
  }
};

struct Restore {
  static constexpr int kWarps = 4;
  struct Shared {};

  static KVX_DEVICE int64_t items(const Job& job) { return num_heads(job) * slabs_of_head(job.layout); }

  // The elements of one line. Every escape that its symbols name is there: their stream was counted.
  static KVX_DEVICE void restore_line(const View& view, const Part& part, int64_t number, int32_t head, int32_t d) {
    const kvx_layout& layout = view.job->layout;
    const uint8_t* const body = view.chunk->payload + view.scratch.begins[number];
    const int64_t in_part = static_cast<int64_t>(head) * part.dim + d;
    const int64_t line = first_line(layout, number) + in_part;
    const uint8_t* const symbols = view.scratch.symbols + line * view.scratch.symbol_stride;
    const float step = tame(load<float>(body + 4 * head));
    const bool delta = (body[part.kinds_at() + in_part] & kDelta) != 0;
    auto last = static_cast<uint32_t>(load<int16_t>(body + part.means_at() + 2 * in_part));  // wraps around
    int64_t total = 0;
    for (int32_t i = 0; i < part.streams(); ++i) total += load<uint32_t>(body + part.sizes_at() + 8 * i);
    const uint8_t* escapes = view.chunk->payload + view.scratch.begins[number + 1] - 4 * total +
                             4 * static_cast<int64_t>(view.scratch.escapes[line]);
    uint32_t packed = 0;
    each_token(part, head, d, [&](int64_t t, int64_t cell, int32_t index) {
      packed = t % 4 == 0 ? load_aligned<uint32_t>(symbols + t) : packed >> 8;
      uint32_t residual = (packed & 0xff) - kReach;
      if ((packed & 0xff) == kEscape) {
        residual = load<uint32_t>(escapes);
        escapes += 4;
      }
      const uint32_t q = last + residual;
      store_element(layout, view.chunk->row + cell, index, tame(static_cast<float>(static_cast<int32_t>(q)) * step));
      if (delta) last = q;
    });
  }

  static KVX_DEVICE void run(const Job& job, int64_t item, Shared*) {
    const Place at = place_of(job, item, slabs_of_head(job.layout));
    const View view = view_of(job, at.chunk);
    if (*view.result < 0) return;
    const Part part = part_of(job.layout, *view.scratch.stream_heads, at.part);
    warp::each([&](int lane) {
      const int32_t d = at.slab * warp::kLanes + lane;
      if (d < part.dim) restore_line(view, part, at.part, at.head, d);
    });
  }
};

// Runs every stage; `launch` takes one and returns 0 or an error code.
template <typename Launch>
int64_t decode(const Job& job, const Launch& launch) {
  int64_t error = launch(job, Inspect());
  if (error == 0) error = launch(job, Unfold());
  if (error == 0) error = launch(job, Restore());
  return error;
}

}  // namespace cachegen
}  // namespace kvx
