// Codecs of a fixed number of bits for each element: fp8, int8, and the 4 and 2 bits of KIVI (fixed.h).
//
// Plain C interface; no state, scratch only on the heap of the call; safe in any number of threads.
// Build without contraction of multiplications and additions: results are compared bit for bit.

#include <cstdlib>
#include <initializer_list>
#include <memory>

#include "fixed.h"
#include "isa.h"
#include "kivi.h"

#define KVX_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace kvx;
using namespace kvx::fixed;

// ---- a cell's keys or values, x: (tokens, dim)

template <int32_t scheme>
void encode_bytes(const float* x, int64_t count, uint8_t* out) {
  const float scale = scale_of(scheme, absmax(x, count)), inverse = fixed::inverse_of(scale);
  store(out, scale);
  for (int64_t i = 0; i < count; ++i) out[4 + i] = to_code(scheme, x[i] * inverse);
}

template <int32_t scheme>
void decode_bytes(const uint8_t* in, int64_t count, float* x) {
  const float scale = tame(load<float>(in));
  for (int64_t i = 0; i < count; ++i) x[i] = tame(from_code(scheme, in[4 + i]) * scale);
}

void encode_plane(int32_t scheme, bool keys, int64_t tokens, int64_t dim, const float* x, uint8_t* out) {
  if (scheme == kFp8) return encode_bytes<kFp8>(x, tokens * dim, out);
  if (scheme == kInt8) return encode_bytes<kInt8>(x, tokens * dim, out);
  if (scheme == kKivi4) return encode_kivi<4>(keys, tokens, dim, x, out);
  encode_kivi<2>(keys, tokens, dim, x, out);
}

void decode_plane(int32_t scheme, bool keys, int64_t tokens, int64_t dim, const uint8_t* in, float* x) {
  if (scheme == kFp8) return decode_bytes<kFp8>(in, tokens * dim, x);
  if (scheme == kInt8) return decode_bytes<kInt8>(in, tokens * dim, x);
  if (scheme == kKivi4) return decode_kivi<4>(keys, tokens, dim, in, x);
  decode_kivi<2>(keys, tokens, dim, in, x);
}

std::unique_ptr<float, void (*)(void*)> scratch(const kvx_layout& layout) {
  const int64_t dim = layout.k_dim > layout.v_dim ? layout.k_dim : layout.v_dim;
  const auto bytes = static_cast<size_t>(layout.tokens * dim) * sizeof(float);
  return {static_cast<float*>(std::malloc(bytes)), std::free};
}

// Writes what follows the header.
void encode_cells(const kvx_layout& layout, int32_t scheme, const uint8_t* row, float* x, uint8_t* out) {
  const Index indices[] = {index_of(layout, true), index_of(layout, false)};
  for (int64_t cell = 0; cell < num_cells(layout); ++cell) {
    for (const bool keys : {true, false}) {
      load_plane(layout, row + layout.cells[cell], indices[keys ? 0 : 1], x);
      encode_plane(scheme, keys, layout.tokens, keys ? layout.k_dim : layout.v_dim, x, out);
      out += plane_bytes(layout, scheme, keys);
    }
  }
}

// Reads it.
void decode_cells(const kvx_layout& layout, int32_t scheme, const uint8_t* coded, float* x, uint8_t* row) {
  const Index indices[] = {index_of(layout, true), index_of(layout, false)};
  for (int64_t cell = 0; cell < num_cells(layout); ++cell) {
    for (const bool keys : {true, false}) {
      decode_plane(scheme, keys, layout.tokens, keys ? layout.k_dim : layout.v_dim, coded, x);
      store_plane(layout, row + layout.cells[cell], indices[keys ? 0 : 1], x);
      coded += plane_bytes(layout, scheme, keys);
    }
  }
}

machine::Isa chosen(int32_t isa) { return isa == 0 ? machine::best_isa() : static_cast<machine::Isa>(isa); }

}  // namespace

// Raised with every change of the interface below; ops/fixed.py refuses another.
KVX_EXPORT int32_t kvx_fixed_abi() { return 2; }

// The length of every payload of rows of this layout, or kBadScheme.
KVX_EXPORT int64_t kvx_fixed_bytes(const kvx_layout* layout, int32_t scheme) {
  return is_scheme(scheme) ? payload_bytes(*layout, scheme) : static_cast<int64_t>(kBadScheme);
}

// The best instruction set of this machine, as machine::Isa.
KVX_EXPORT int32_t kvx_fixed_isa() { return static_cast<int32_t>(machine::best_isa()); }

// Writes the payload of a row to out[0, out_bytes), which must be kvx_fixed_bytes; 0 or a Refusal.
KVX_EXPORT int64_t kvx_fixed_encode(const kvx_layout* layout, int32_t scheme, const uint8_t* row, uint8_t* out,
                                    int64_t out_bytes, int32_t isa) {
  if (!is_scheme(scheme)) return kBadScheme;
  if (out_bytes != payload_bytes(*layout, scheme)) return kOtherLength;
  const auto x = scratch(*layout);
  if (!x) return kNoMemory;
  write_header(*layout, scheme, out);
  machine::on(chosen(isa), [&](auto) { encode_cells(*layout, scheme, row, x.get(), out + kHeaderBytes); });
  return 0;
}

// Fills the elements of a row from a payload, and only them; 0 or a Refusal, before it has touched the row.
KVX_EXPORT int64_t kvx_fixed_decode(const kvx_layout* layout, int32_t scheme, const uint8_t* coded,
                                    int64_t coded_bytes, uint8_t* row, int32_t isa) {
  if (const int64_t refusal = judge(*layout, scheme, coded, coded_bytes)) return refusal;
  const auto x = scratch(*layout);
  if (!x) return kNoMemory;
  machine::on(chosen(isa), [&](auto) { decode_cells(*layout, scheme, coded + kHeaderBytes, x.get(), row); });
  return 0;
}
