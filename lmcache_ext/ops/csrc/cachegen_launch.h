// How calls of the cachegen codec become launches.

#pragma once

#include "cachegen_decode.h"
#include "cachegen_encode.h"

namespace kvx {
namespace cachegen {

// Fills the image that launches read; `layout` has its tables on the host, `bins` are those of all parts.
inline int64_t fill_tables(const kvx_layout& layout, const float* bins, uint8_t* out) {
  const Tables tables = tables_at(layout, out);
  *tables.models = models();
  std::copy_n(bins, num_parts(layout), tables.bins);
  return fill_places(layout, tables.places);
}

// `launch` takes a job and a stage, and returns 0 or an error code.
template <typename Launch>
int64_t code(const Call& call, bool encodes, const Launch& launch) {
  const int64_t bytes = scratch_at(*call.layout, encodes, nullptr).bytes;
  const Tables tables = tables_at(*call.layout, call.tables);
  const kvx_layout layout = moved(*call.layout, tables.places);
  Job job = {layout, tables.models, tables.bins, call.scratch, bytes, nullptr, 0, encodes, {}};
  return in_turns(call, bytes, &job,
                  [&](const Job& ready) { return encodes ? encode(ready, launch) : decode(ready, launch); });
}

}  // namespace cachegen
}  // namespace kvx
