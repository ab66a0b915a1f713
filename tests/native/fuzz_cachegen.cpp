// Attacks the cachegen codec under a sanitizer, on hosts and as a GPU runs it: damaged payloads of honest rows.
//
//     fuzz_cachegen ROUNDS SEED
//
// Both decoders must answer alike, and leave alike rows of what they accept.

#include "../../lmcache_ext/ops/csrc/cachegen.cpp"
#include "../../lmcache_ext/ops/csrc/cachegen.cu"

#include "fuzz.h"

namespace {

using fuzz::Bytes;
using fuzz::Random;

int64_t size_of(const Bytes& bytes) { return static_cast<int64_t>(bytes.size()); }

// A GPU's memory for the chunks of one layout; scratch holds what others have left.
struct Device {
  const kvx_layout* layout;
  Bytes tables, scratch;

  Device(Random& random, const kvx_layout& of, const std::vector<float>& bins, bool encodes) : layout(&of) {
    tables.resize(static_cast<size_t>(kvx_cuda_cachegen_tables_bytes(layout)));
    kvx_cuda_cachegen_tables(layout, bins.data(), tables.data());
    scratch = fuzz::noise(random, kvx_cuda_cachegen_scratch_bytes(layout, encodes));
  }

  int64_t code(bool encodes, Bytes* row, Bytes* payload) {
    const Chunk chunk = {row->data(), payload->data(), size_of(*payload)};
    int64_t result = 0;
    const auto coder = encodes ? kvx_cuda_cachegen_encode : kvx_cuda_cachegen_decode;
    const int64_t refusal =
        coder(layout, tables.data(), &chunk, 1, &result, scratch.data(), size_of(scratch), nullptr);
    return refusal != 0 ? refusal : result;
  }
};

bool decode_alike(const kvx_layout& layout, Device* device, Bytes payload, const Bytes& before, int32_t isa) {
  Bytes on_host = before, on_device = before;
  const int64_t answer = kvx_cachegen_decode(&layout, payload.data(), size_of(payload), on_host.data(), isa);
  if (answer > 0 || answer < kBadBody) return fuzz::failed("the host answered", answer);
  const int64_t other = device->code(false, &on_device, &payload);
  if (other != answer) return fuzz::failed("the device answered", other);
  return on_device == (answer == 0 ? on_host : before) || fuzz::failed("another row");
}

// The payload cut off in its last stream, with sizes that agree: too short for the states of its lanes.
Bytes starved(Random& random, const kvx_layout& layout, Bytes payload) {
  const int64_t number = num_parts(layout) - 1;
  const Part part = part_of(layout, stream_heads(layout), number);
  uint8_t* const length = payload.data() + kHeaderBytes + 4 * number;
  const int64_t begin = size_of(payload) - load<uint32_t>(length);
  uint8_t* const sizes = payload.data() + begin + part.sizes_at();
  const auto bytes = static_cast<uint32_t>(random() % rans::kStateBytes);
  int64_t end = part.fixed_bytes() + bytes;
  for (int32_t stream = 0; stream < part.streams(); ++stream) {
    store<uint32_t>(sizes + 8 * stream, 0);  // escapes, which would lie behind
    if (stream + 1 < part.streams()) end += load<uint32_t>(sizes + 8 * stream + 4);
  }
  store(sizes + 8 * (part.streams() - 1) + 4, bytes);
  store(length, static_cast<uint32_t>(end));
  payload.resize(static_cast<size_t>(begin + end));
  payload.shrink_to_fit();
  return payload;
}

bool attack(Random& random) {
  const fuzz::Scene scene(random, 3, 3, 70, 20);
  const kvx_layout& layout = scene.layout;
  Bytes row(static_cast<size_t>(layout.row_bytes));
  for (uint8_t& byte : row) byte = static_cast<uint8_t>(random() % 2 ? random() : 0x3f);
  const std::vector<float> bins(static_cast<size_t>(2 * layout.layers), random() % 2 ? 12.0f : 200.0f);
  Bytes payload(row.size() * 4 + 16384), twin(payload.size());
  const auto isa = static_cast<int32_t>(1 + random() % static_cast<uint64_t>(kvx_cachegen_isa()));
  const int64_t written = kvx_cachegen_encode(&layout, bins.data(), row.data(), payload.data(), size_of(payload), isa);
  if (written < 0) return fuzz::failed("refused an honest row", written);
  twin.resize(static_cast<size_t>(written)), payload.resize(static_cast<size_t>(written));
  Device encoder(random, layout, bins, true), decoder(random, layout, bins, false);
  if (encoder.code(true, &row, &twin) != written || twin != payload) return fuzz::failed("another payload");
  if (kvx_cachegen_decode(&layout, payload.data(), written, row.data(), isa) != 0) return fuzz::failed("lost a row");
  for (int i = 0; i < 20; ++i) {
    if (!decode_alike(layout, &decoder, fuzz::damaged(random, payload, 120), row, isa)) return false;
  }
  return decode_alike(layout, &decoder, starved(random, layout, payload), row, isa) &&
         decode_alike(layout, &decoder, payload, row, isa);
}

}  // namespace

int main(int argc, char** argv) { return fuzz::rounds(argc, argv, attack); }
