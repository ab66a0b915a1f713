// Chunks of one layout that a GPU codes together: what a call is given, what is checked, how it becomes launches.
//
// All memory is the caller's. Where elements lie is part of an image of bytes that the caller has put into the GPU's
// memory, once for all calls. Chunks that scratch has no room for wait for the next launch on the same stream.

#pragma once

#include <algorithm>

#include "elements.h"

namespace kvx {

constexpr int kMaxChunks = 64;  // of one launch; more take more launches

struct Chunk {
  uint8_t* row;
  uint8_t* payload;
  int64_t payload_bytes;  // of the payload, or of the room for it
};

// What a call is given: `tables`, `results`, `scratch` and what chunks point to are the GPU's.
struct Call {
  const kvx_layout* layout;  // its tables are not looked at
  uint8_t* tables;
  const Chunk* chunks;
  int64_t count;
  int64_t* results;
  uint8_t* scratch;
  int64_t scratch_bytes;
};

// Refusals of a call, before anything is launched; each chunk has its own beside them.
constexpr int64_t kUnaligned = INT64_MIN;  // a row, a cell, the tables or the scratch
constexpr int64_t kScratchTooSmall = INT64_MIN + 1;
constexpr int64_t kLaunchFailed = INT64_MIN + 2;  // plus the driver's error code

KVX_DEVICE int64_t up(int64_t bytes, int64_t multiple) { return (bytes + multiple - 1) / multiple * multiple; }

// Sets an array of `count` at byte `at` behind `base` and moves `at` on, to a multiple of 16.
template <typename T>
KVX_DEVICE void reserve(uint8_t* base, int64_t count, int64_t* at, T** array) {
  *array = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(base) + static_cast<uintptr_t>(*at));
  *at += up(count * static_cast<int64_t>(sizeof(T)), 16);
}

// Where elements lie, in the image.
struct Places {
  int64_t* cells;
  int32_t* k_index;
  int32_t* v_index;
};

inline Places places_at(const kvx_layout& layout, uint8_t* base, int64_t* at) {
  Places places;
  reserve(base, num_cells(layout), at, &places.cells);
  reserve(base, static_cast<int64_t>(layout.tokens) * layout.k_dim, at, &places.k_index);
  reserve(base, static_cast<int64_t>(layout.tokens) * layout.v_dim, at, &places.v_index);
  return places;
}

inline kvx_layout moved(const kvx_layout& layout, const Places& places) {
  kvx_layout there = layout;
  there.cells = places.cells, there.k_index = places.k_index, there.v_index = places.v_index;
  return there;
}

inline int64_t element_bytes(const kvx_layout& layout) { return layout.dtype == kFloat32 ? 4 : 2; }

// Copies a host's tables to where an image has them; 0 or kUnaligned.
inline int64_t fill_places(const kvx_layout& layout, const Places& places) {
  for (int64_t i = 0; i < num_cells(layout); ++i) {
    if (layout.cells[i] % element_bytes(layout) != 0) return kUnaligned;
  }
  std::copy_n(layout.cells, num_cells(layout), places.cells);
  std::copy_n(layout.k_index, static_cast<int64_t>(layout.tokens) * layout.k_dim, places.k_index);
  std::copy_n(layout.v_index, static_cast<int64_t>(layout.tokens) * layout.v_dim, places.v_index);
  return 0;
}

inline bool is_multiple(const void* address, int64_t of) {
  return reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(of) == 0;
}

inline int64_t check(const Call& call, int64_t bytes_of_chunk) {
  if (!is_multiple(call.tables, 16) || !is_multiple(call.scratch, 16)) return kUnaligned;
  for (int64_t i = 0; i < call.count; ++i) {
    if (!is_multiple(call.chunks[i].row, element_bytes(*call.layout))) return kUnaligned;
  }
  return call.count > 0 && call.scratch_bytes < bytes_of_chunk ? kScratchTooSmall : 0;
}

// Hands `run` the job with as many chunks at a time as scratch has room for; it returns 0 or an error code.
template <typename Job, typename Run>
int64_t in_turns(const Call& call, int64_t bytes_of_chunk, Job* job, const Run& run) {
  if (const int64_t refusal = check(call, bytes_of_chunk)) return refusal;
  const int64_t room = bytes_of_chunk > 0 && call.count > 0 ? call.scratch_bytes / bytes_of_chunk : kMaxChunks;
  const int64_t most = std::min<int64_t>(kMaxChunks, room);
  for (int64_t first = 0; first < call.count; first += most) {
    job->count = static_cast<int32_t>(std::min(most, call.count - first));
    job->results = call.results + first;
    std::copy_n(call.chunks + first, job->count, job->chunks);
    const int64_t error = run(*job);
    if (error != 0) return kLaunchFailed + error;
  }
  return 0;
}

}  // namespace kvx
