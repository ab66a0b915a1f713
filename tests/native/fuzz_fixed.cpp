// Attacks the fixed-rate codecs under a sanitizer: payloads of noise, of wrong lengths, with damaged headers.
//
//     fuzz_fixed ROUNDS SEED

#include "../../lmcache_ext/ops/csrc/fixed.cpp"

#include "fuzz.h"

namespace {

using fuzz::Bytes;
using fuzz::Random;

bool attack(Random& random) {
  const fuzz::Scene scene(random, 2, 2, 40, 40);
  const auto scheme = static_cast<int32_t>(random() % 4);
  Bytes row = fuzz::noise(random, scene.layout.row_bytes);
  Bytes payload(static_cast<size_t>(kvx_fixed_bytes(&scene.layout, scheme)));
  const auto decode = [&] {
    const auto size = static_cast<int64_t>(payload.size());
    return kvx_fixed_decode(&scene.layout, scheme, payload.data(), size, row.data());
  };
  const auto size = static_cast<int64_t>(payload.size());
  const int64_t answer = kvx_fixed_encode(&scene.layout, scheme, row.data(), payload.data(), size);
  if (answer != 0) return fuzz::failed("refused an honest row", answer);
  for (size_t i = kHeaderBytes; i < payload.size(); ++i) payload[i] = static_cast<uint8_t>(random());
  if (decode() != 0) return fuzz::failed("refused noise behind an honest header");
  payload[random() % kHeaderBytes] ^= static_cast<uint8_t>(1u << random() % 8);
  if (decode() == 0) return fuzz::failed("accepted a damaged header");
  payload.resize(random() % payload.size());
  payload.shrink_to_fit();
  return decode() != 0 || fuzz::failed("accepted a part of a payload");
}

}  // namespace

int main(int argc, char** argv) { return fuzz::rounds(argc, argv, attack); }
