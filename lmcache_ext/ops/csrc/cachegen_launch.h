// What is checked before anything is launched, and how chunks are shared out to launches: for GPUs and for the tests.

#pragma once

#include <algorithm>

#include "cachegen_decode.h"
#include "cachegen_encode.h"

namespace kvx {
namespace cachegen {

// Refusals of a call, before anything is launched; each chunk has its own beside them.
constexpr int64_t kUnaligned = INT64_MIN;         // a row, a cell, the tables or the scratch
constexpr int64_t kScratchTooSmall = INT64_MIN + 1;
constexpr int64_t kLaunchFailed = INT64_MIN + 2;  // plus the driver's error code

inline int64_t element_bytes(const kvx_layout& layout) { return layout.dtype == kFloat32 ? 4 : 2; }

inline bool is_multiple(const void* address, int64_t of) {
  return reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(of) == 0;
}

// Fills the image that launches read; `layout` has its tables on the host, `bins` are those of all parts.
inline int64_t fill_tables(const kvx_layout& layout, const float* bins, uint8_t* out) {
  for (int64_t i = 0; i < num_cells(layout); ++i) {
    if (layout.cells[i] % element_bytes(layout) != 0) return kUnaligned;
  }
  const Tables tables = tables_at(layout, out);
  *tables.models = models();
  std::copy_n(layout.cells, num_cells(layout), tables.cells);
  std::copy_n(layout.k_index, static_cast<int64_t>(layout.tokens) * layout.k_dim, tables.k_index);
  std::copy_n(layout.v_index, static_cast<int64_t>(layout.tokens) * layout.v_dim, tables.v_index);
  std::copy_n(bins, num_parts(layout), tables.bins);
  return 0;
}

// What a call is given: `tables`, `results`, `scratch` and what chunks point to are the GPU's.
struct Call {
  const kvx_layout* layout;
  uint8_t* tables;
  const Chunk* chunks;
  int64_t count;
  int64_t* results;
  uint8_t* scratch;
  int64_t scratch_bytes;
};

inline int64_t check(const Call& call, int64_t bytes_of_chunk) {
  if (!is_multiple(call.tables, 16) || !is_multiple(call.scratch, 16)) return kUnaligned;
  for (int64_t i = 0; i < call.count; ++i) {
    if (!is_multiple(call.chunks[i].row, element_bytes(*call.layout))) return kUnaligned;
  }
  return call.count > 0 && call.scratch_bytes < bytes_of_chunk ? kScratchTooSmall : 0;
}

// Codes as many chunks at a time as scratch has room for; `launch` takes a job and a stage, returns 0 or an error code.
template <typename Launch>
int64_t code(const Call& call, bool encodes, const Launch& launch) {
  const int64_t bytes = scratch_at(*call.layout, encodes, nullptr).bytes;
  if (const int64_t refusal = check(call, bytes)) return refusal;
  const Tables tables = tables_at(*call.layout, call.tables);
  Job job = {*call.layout, tables.models, tables.bins, call.scratch, bytes, nullptr, 0, encodes, {}};
  job.layout.cells = tables.cells, job.layout.k_index = tables.k_index, job.layout.v_index = tables.v_index;
  const int64_t most = std::min<int64_t>(kMaxChunks, call.count > 0 ? call.scratch_bytes / bytes : 1);
  for (int64_t first = 0; first < call.count; first += most) {
    job.count = static_cast<int32_t>(std::min(most, call.count - first));
    job.results = call.results + first;
    std::copy_n(call.chunks + first, job.count, job.chunks);
    const int64_t error = encodes ? encode(job, launch) : decode(job, launch);
    if (error != 0) return kLaunchFailed + error;
  }
  return 0;
}

}  // namespace cachegen
}  // namespace kvx
