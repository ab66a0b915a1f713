// Attacks the lossless codec under a sanitizer: damaged payloads of honest rows, and made-up ones.
//
//     fuzz_lossless ROUNDS SEED
//
// A round that decodes must have been told so; whatever it decoded to is only compared where nothing was damaged.

#include "../../lmcache_ext/ops/csrc/lossless.cpp"

#include "fuzz.h"

namespace {

using fuzz::Bytes;
using fuzz::Random;

Bytes row_of(Random& random, int64_t bytes) {
  Bytes row(static_cast<size_t>(bytes));
  const uint64_t kind = random() % 4;  // noise, a constant, few values, a slope of exponents
  for (size_t i = 0; i < row.size(); ++i) {
    const uint64_t r = random();
    row[i] = static_cast<uint8_t>(kind == 0 ? r : kind == 1 ? 7 : kind == 2 ? r % 5 * r % 3 : 60 + (i & 1) * (r % 8));
  }
  return row;
}

bool attack(Random& random) {
  const int64_t element_bytes = int64_t{1} << random() % 3;
  const int64_t segment = random() % 2 ? 4096 : 1 + static_cast<int64_t>(random() % 700);
  const Bytes row = row_of(random, static_cast<int64_t>(random() % 9000));
  const auto size = static_cast<int64_t>(row.size());
  Bytes payload(static_cast<size_t>(size + 16 + 4 * element_bytes * (size / element_bytes / segment + 1)));
  const auto isa = static_cast<int32_t>(1 + random() % static_cast<uint64_t>(kvx_lossless_isa()));
  const int64_t written = kvx_lossless_encode(row.data(), size, element_bytes, segment, payload.data(),
                                              static_cast<int64_t>(payload.size()), isa);
  if (written < 0) return fuzz::failed("refused an honest row", written);
  payload.resize(static_cast<size_t>(written));
  Bytes back(row.size());
  const int64_t decoded = kvx_lossless_decode(payload.data(), written, back.data(), size, isa);
  if (decoded != size || back != row) return fuzz::failed("lost an honest row", isa);
  for (int i = 0; i < 20; ++i) {
    const Bytes hostile = fuzz::damaged(random, payload, 64);
    const int64_t answer = kvx_lossless_decode(hostile.data(), static_cast<int64_t>(hostile.size()), back.data(), size,
                                               isa);
    if (answer != size && (answer >= 0 || answer < kBadBody)) return fuzz::failed("answered", answer);
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) { return fuzz::rounds(argc, argv, attack); }
