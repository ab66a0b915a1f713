// The fixed-rate codecs on a GPU, bit for bit what fixed.cpp writes and reads. Plain C++.
//
// A warp codes the keys, or the values, of one cell: a lane has every 32nd element, or every 32nd group of KIVI.

#pragma once

#include "chunks.h"
#include "fixed.h"
#include "warp.h"

namespace kvx {
namespace fixed {

// The parameters of a launch.
struct Job {
  kvx_layout layout;  // its tables in the GPU's memory
  int32_t scheme;
  int32_t count;
  int64_t* results;  // (count)
  Chunk chunks[kMaxChunks];
};

static_assert(sizeof(Job) <= 4096, "fits the parameters of a kernel");

// The keys or the values of one cell, in a row and in its payload.
struct Plane {
  const Job* job;
  uint8_t* cell;
  uint8_t* coded;
  const int32_t* index;
  int64_t elements;
  Walk walk;

  KVX_DEVICE float get(int64_t i) const { return load_element(job->layout, cell, index[i]); }
  KVX_DEVICE void put(int64_t i, float x) const { store_element(job->layout, cell, index[i], x); }
  KVX_DEVICE int64_t groups() const { return walk.lines * walk.groups_of_line(); }
  KVX_DEVICE Group group(int bits, int64_t number) const {
    return group_of(walk, bits, number / walk.groups_of_line(), number % walk.groups_of_line());
  }
};

struct Where {
  int64_t chunk;
  int64_t cell;
  bool keys;
};

KVX_DEVICE int64_t num_planes(const Job& job) { return 2 * job.count * num_cells(job.layout); }

KVX_DEVICE Where where(const Job& job, int64_t item) {
  const int64_t cells = num_cells(job.layout);
  return {item / 2 / cells, item / 2 % cells, item % 2 == 0};
}

KVX_DEVICE Plane plane_at(const Job& job, const Where& at) {
  const kvx_layout& layout = job.layout;
  const Chunk& chunk = job.chunks[at.chunk];
  const int64_t keys = plane_bytes(layout, job.scheme, true), values = plane_bytes(layout, job.scheme, false);
  const int64_t begin = kHeaderBytes + at.cell * (keys + values) + (at.keys ? 0 : keys);
  const int64_t tokens = layout.tokens, dim = at.keys ? layout.k_dim : layout.v_dim;
  return {&job, chunk.row + layout.cells[at.cell], chunk.payload + begin, at.keys ? layout.k_index : layout.v_index,
          tokens * dim, walk_of(at.keys, tokens, dim)};
}

// Says how long payloads become, or whether they are what they should be.
template <bool encodes>
struct Judge {
  static constexpr int kWarps = 1;  // of a block of threads
  struct Shared {};

  static KVX_DEVICE int64_t items(const Job& job) { return job.count; }

  static KVX_DEVICE int64_t answer(const Job& job, const Chunk& chunk) {
    if (!encodes) return judge(job.layout, job.scheme, chunk.payload, chunk.payload_bytes);
    const int64_t bytes = payload_bytes(job.layout, job.scheme);
    if (chunk.payload_bytes != bytes) return kOtherLength;
    write_header(job.layout, job.scheme, chunk.payload);
    return bytes;
  }

  static KVX_DEVICE void run(const Job& job, int64_t item, Shared*) {
    warp::each([&](int lane) {
      if (lane == 0) job.results[item] = answer(job, job.chunks[item]);
    });
  }
};

struct Encode {
  static constexpr int kWarps = 4;
  struct Shared {};

  static KVX_DEVICE int64_t items(const Job& job) { return num_planes(job); }

  static KVX_DEVICE void encode_bytes(const Plane& plane, int32_t scheme) {
    warp::Lanes<uint32_t> mosts;
    warp::each([&](int lane) {
      uint32_t most = 0;
      for (int64_t i = lane; i < plane.elements; i += warp::kLanes) {
        const uint32_t magnitude = bits_of(plane.get(i)) & 0x7fffffff;
        most = magnitude > most ? magnitude : most;
      }
      mosts[lane] = most;
    });
    const float scale = scale_of(scheme, of_bits(warp::most(mosts))), inverse = fixed::inverse_of(scale);
    warp::each([&](int lane) {
      if (lane == 0) store(plane.coded, scale);
      for (int64_t i = lane; i < plane.elements; i += warp::kLanes) {
        plane.coded[4 + i] = to_code(scheme, plane.get(i) * inverse);
      }
    });
  }

  template <int bits>
  static KVX_DEVICE void encode_groups(const Plane& plane) {
    warp::each([&](int lane) {
      for (int64_t number = lane; number < plane.groups(); number += warp::kLanes) {
        const Group group = plane.group(bits, number);
        const auto get = [&](int64_t i) { return plane.get(group.first + i * group.stride); };
        encode_group<bits>(group.count, get, plane.coded + group.at);
      }
    });
  }

  static KVX_DEVICE void run(const Job& job, int64_t item, Shared*) {
    const Where at = where(job, item);
    if (job.results[at.chunk] < 0) return;
    const Plane plane = plane_at(job, at);
    if (job.scheme == kKivi4) return encode_groups<4>(plane);
    if (job.scheme == kKivi2) return encode_groups<2>(plane);
    encode_bytes(plane, job.scheme);
  }
};

struct Decode {
  static constexpr int kWarps = 4;
  struct Shared {};

  static KVX_DEVICE int64_t items(const Job& job) { return num_planes(job); }

  static KVX_DEVICE void decode_bytes(const Plane& plane, int32_t scheme) {
    const float scale = tame(load<float>(plane.coded));
    warp::each([&](int lane) {
      for (int64_t i = lane; i < plane.elements; i += warp::kLanes) {
        plane.put(i, tame(from_code(scheme, plane.coded[4 + i]) * scale));
      }
    });
  }

  template <int bits>
  static KVX_DEVICE void decode_groups(const Plane& plane) {
    warp::each([&](int lane) {
      for (int64_t number = lane; number < plane.groups(); number += warp::kLanes) {
        const Group group = plane.group(bits, number);
        const auto put = [&](int64_t i, float x) { plane.put(group.first + i * group.stride, x); };
        decode_group<bits>(plane.coded + group.at, group.count, put);
      }
    });
  }

  static KVX_DEVICE void run(const Job& job, int64_t item, Shared*) {
    const Where at = where(job, item);
    if (job.results[at.chunk] < 0) return;
    const Plane plane = plane_at(job, at);
    if (job.scheme == kKivi4) return decode_groups<4>(plane);
    if (job.scheme == kKivi2) return decode_groups<2>(plane);
    decode_bytes(plane, job.scheme);
  }
};

// `launch` takes a job and a stage, and returns 0 or an error code.
template <typename Launch>
int64_t code(const Call& call, int32_t scheme, bool encodes, const Launch& launch) {
  if (!is_scheme(scheme)) return kBadScheme;
  int64_t at = 0;
  Job job = {moved(*call.layout, places_at(*call.layout, call.tables, &at)), scheme, 0, nullptr, {}};
  return in_turns(call, 0, &job, [&](const Job& ready) {
    const int64_t error = encodes ? launch(ready, Judge<true>()) : launch(ready, Judge<false>());
    if (error != 0) return error;
    return encodes ? launch(ready, Encode()) : launch(ready, Decode());
  });
}

}  // namespace fixed
}  // namespace kvx
