// What a launch of the cachegen codec on a GPU is told, and where its scratch lies. Plain C++.
//
// Work is cut into what one warp does:
//
//     slab      32 lines of a head: elements <-> symbols
//     stream    one stream: symbols <-> words

#pragma once

#include "cachegen.h"
#include "chunks.h"
#include "warp.h"

namespace kvx {
namespace cachegen {

struct alignas(16) Vector {
  uint32_t words[4];
};

struct Sizes {
  uint32_t escapes;
  uint32_t bytes;
};

KVX_DEVICE int64_t num_parts(const kvx_layout& layout) { return 2 * static_cast<int64_t>(layout.layers); }

KVX_DEVICE int64_t num_lines(const kvx_layout& layout) {
  return static_cast<int64_t>(layout.layers) * layout.heads * (layout.k_dim + layout.v_dim);
}

KVX_DEVICE int32_t slabs_of_head(const kvx_layout& layout) {
  return ((layout.k_dim > layout.v_dim ? layout.k_dim : layout.v_dim) + warp::kLanes - 1) / warp::kLanes;
}

// Arrays of one chunk in scratch.
struct Scratch {
  int64_t* begins;     // (parts + 1): where a part's body begins in the payload
  Sizes* sizes;        // (parts, heads): of streams
  Sizes* places;       // (parts, heads): where in its body a stream's escapes and bytes begin
  float* steps;        // (parts, heads)
  float* squares;      // (lines)
  uint32_t* escapes;   // (lines): how many, then how many before it in its part
  int32_t* order;      // (lines): elements of each head in the order of coding
  int16_t* means;      // (lines)
  uint8_t* kinds;      // (lines)
  uint8_t* symbols;    // (lines, symbol_stride)
  uint16_t* words;     // of each stream one for each symbol and two for each state, filled from its end
  int32_t* stream_heads;  // one number: of the payload that is read
  int64_t symbol_stride;
  int64_t bytes;       // of all of it
};

// `base` is a multiple of 16, or null to learn the size.
KVX_DEVICE Scratch scratch_at(const kvx_layout& layout, bool encodes, uint8_t* base) {
  const int64_t parts = num_parts(layout), heads = parts * layout.heads, lines = num_lines(layout);
  Scratch s;
  s.symbol_stride = up(tokens_of(layout), 16);
  int64_t at = 0;
  reserve(base, parts + 1, &at, &s.begins);
  reserve(base, heads, &at, &s.sizes);
  reserve(base, heads, &at, &s.places);
  reserve(base, heads, &at, &s.steps);
  reserve(base, lines, &at, &s.squares);
  reserve(base, lines, &at, &s.escapes);
  reserve(base, lines, &at, &s.order);
  reserve(base, lines, &at, &s.means);
  reserve(base, lines, &at, &s.kinds);
  reserve(base, 1, &at, &s.stream_heads);
  reserve(base, lines * s.symbol_stride, &at, &s.symbols);
  reserve(base, encodes ? lines * tokens_of(layout) + heads * 2 * warp::kLanes : 0, &at, &s.words);
  s.bytes = at;
  return s;
}

// The image that launches read: the models, the bins, where elements lie.
struct Tables {
  Models* models;
  float* bins;  // (parts)
  Places places;
  int64_t bytes;
};

// `base` is a multiple of 16, or null to learn the size.
inline Tables tables_at(const kvx_layout& layout, uint8_t* base) {
  Tables t;
  int64_t at = 0;
  reserve(base, 1, &at, &t.models);
  reserve(base, num_parts(layout), &at, &t.bins);
  t.places = places_at(layout, base, &at);
  t.bytes = at;
  return t;
}

// The parameters of a launch.
struct Job {
  kvx_layout layout;  // its tables in the GPU's memory
  const Models* models;
  const float* bins;
  uint8_t* scratch;
  int64_t scratch_bytes;  // of each chunk
  int64_t* results;       // (count)
  int32_t count;
  bool encodes;
  Chunk chunks[kMaxChunks];
};

static_assert(sizeof(Job) <= 4096, "fits the parameters of a kernel");

// One chunk of a job, as its warps see it.
struct View {
  const Job* job;
  const Chunk* chunk;
  int64_t* result;
  Scratch scratch;
};

KVX_DEVICE View view_of(const Job& job, int64_t chunk) {
  uint8_t* const base = job.scratch + chunk * job.scratch_bytes;
  return {&job, &job.chunks[chunk], &job.results[chunk], scratch_at(job.layout, job.encodes, base)};
}

KVX_DEVICE int64_t first_line(const kvx_layout& layout, int64_t part) {
  const int64_t keys = static_cast<int64_t>(layout.heads) * layout.k_dim;
  const int64_t values = static_cast<int64_t>(layout.heads) * layout.v_dim;
  return part / 2 * (keys + values) + part % 2 * keys;
}

// One past the words of a stream, in the words of the chunk; each head before it has had room for a stream of its own.
KVX_DEVICE int64_t words_end(const Part& part, int64_t number, int64_t stream) {
  const int64_t heads = part.end_head(static_cast<int32_t>(stream));
  const int64_t lines = first_line(*part.layout, number) + heads * part.dim;
  return lines * part.tokens() + (number * part.layout->heads + heads) * 2 * warp::kLanes;
}

// What item of a stage is what: chunk, part, and a head or stream, and a slab.
struct Place {
  int64_t chunk;
  int64_t part;
  int32_t head;
  int32_t slab;
};

KVX_DEVICE int64_t num_heads(const Job& job) { return job.count * num_parts(job.layout) * job.layout.heads; }

KVX_DEVICE Place place_of(const Job& job, int64_t item, int32_t slabs) {
  const auto slab = static_cast<int32_t>(item % slabs);
  item /= slabs;
  const auto head = static_cast<int32_t>(item % job.layout.heads);
  item /= job.layout.heads;
  return {item / num_parts(job.layout), item % num_parts(job.layout), head, slab};
}

// Calls take(t, place) for the tokens of a line in order: where its elements lie.
template <typename Take>
KVX_DEVICE void each_token(const Part& part, int32_t head, int32_t d, const Take& take) {
  const kvx_layout& layout = *part.layout;
  const int64_t* cells = part.cells + static_cast<int64_t>(head) * layout.blocks;
  int64_t t = 0;
  for (int32_t block = 0; block < layout.blocks; ++block) {
    const int64_t cell = cells[block];
    for (int32_t i = 0; i < layout.tokens; ++i) take(t++, cell, part.index[i * part.dim + d]);
  }
}

// Puts the lines of one head into the order of coding, by class and then by element: lane k places those of class k.
KVX_DEVICE void order_lines(const uint8_t* kinds, int32_t dim, int32_t* order) {
  warp::Lanes<int64_t> counts;
  warp::each([&](int lane) {
    int64_t found = 0;
    for (int32_t d = 0; d < dim; ++d) found += (kinds[d] & ~kDelta) == lane;
    counts[lane] = found;
  });
  int64_t total = 0;
  const warp::Lanes<int64_t> before = warp::sum_before(counts, &total);
  warp::each([&](int lane) {
    int64_t at = before[lane];
    for (int32_t d = 0; d < dim; ++d) {
      if ((kinds[d] & ~kDelta) == lane) order[at++] = d;
    }
  });
  warp::meet();
}

// Copies what all lanes will look up to where that is quick; sizes are multiples of 16.
template <typename T>
KVX_DEVICE void bring(const T* from, int64_t bytes, T* to) {
  warp::meet();  // nobody looks at what was there before
  const auto* source = reinterpret_cast<const Vector*>(from);
  auto* target = reinterpret_cast<Vector*>(to);
  warp::each([&](int lane) {
    for (int64_t i = lane; i < bytes / static_cast<int64_t>(sizeof(Vector)); i += warp::kLanes) target[i] = source[i];
  });
  warp::meet();
}

}  // namespace cachegen
}  // namespace kvx
