// Attacks the fixed-rate codecs under a sanitizer, on hosts and as a GPU runs them: payloads of noise, of wrong lengths,
// with damaged headers.
//
//     fuzz_fixed ROUNDS SEED
//
// Both coders must answer alike, and write alike.

#include "../../lmcache_ext/ops/csrc/fixed.cpp"
#include "../../lmcache_ext/ops/csrc/fixed.cu"

#include "fuzz.h"

namespace {

using fuzz::Bytes;
using fuzz::Random;

struct Codec {
  const kvx_layout* layout;
  int32_t scheme;
  Bytes tables;

  Codec(const kvx_layout& of, int32_t which) : layout(&of), scheme(which) {
    tables.resize(static_cast<size_t>(kvx_cuda_fixed_tables_bytes(layout)));
    kvx_cuda_fixed_tables(layout, tables.data());
  }

  int64_t on_device(bool encodes, Bytes* row, Bytes* payload) {
    const Chunk chunk = {row->data(), payload->data(), static_cast<int64_t>(payload->size())};
    int64_t result = 0;
    const auto coder = encodes ? kvx_cuda_fixed_encode : kvx_cuda_fixed_decode;
    const int64_t refusal = coder(layout, scheme, tables.data(), &chunk, 1, &result, nullptr);
    return refusal != 0 ? refusal : result;
  }

  // Whether both decoders answer so, and with the same row.
  bool answers(bool accepts, const Bytes& before, Bytes payload) {
    payload.shrink_to_fit();
    Bytes here = before, there = before;
    const auto size = static_cast<int64_t>(payload.size());
    const int64_t answer = kvx_fixed_decode(layout, scheme, payload.data(), size, here.data(), 0);
    const int64_t other = on_device(false, &there, &payload);
    return (answer == 0) == accepts && other == answer && here == there && (accepts || here == before);
  }
};

bool attack(Random& random) {
  const fuzz::Scene scene(random, 2, 2, 40, 40);
  Codec codec(scene.layout, static_cast<int32_t>(random() % 4));
  Bytes row = fuzz::noise(random, scene.layout.row_bytes);
  Bytes payload(static_cast<size_t>(kvx_fixed_bytes(&scene.layout, codec.scheme))), twin(payload.size());
  const auto size = static_cast<int64_t>(payload.size());
  const int64_t answer = kvx_fixed_encode(&scene.layout, codec.scheme, row.data(), payload.data(), size, 0);
  if (answer != 0) return fuzz::failed("refused an honest row", answer);
  if (codec.on_device(true, &row, &twin) != size || twin != payload) return fuzz::failed("another payload");
  for (size_t i = kHeaderBytes; i < payload.size(); ++i) payload[i] = static_cast<uint8_t>(random());
  if (!codec.answers(true, row, payload)) return fuzz::failed("noise behind an honest header");
  payload[random() % kHeaderBytes] ^= static_cast<uint8_t>(1u << random() % 8);
  if (!codec.answers(false, row, payload)) return fuzz::failed("a damaged header");
  payload.resize(random() % payload.size());
  return codec.answers(false, row, payload) || fuzz::failed("a part of a payload");
}

}  // namespace

int main(int argc, char** argv) { return fuzz::rounds(argc, argv, attack); }
