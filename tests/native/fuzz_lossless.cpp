// Attacks the lossless codec under a sanitizer: damaged payloads of honest rows, and made-up ones.
//
//     fuzz_lossless ROUNDS SEED
//
// Every buffer has exactly the size it is said to have, so the sanitizer sees the first byte beyond. A round
// that decodes must have been told so; whatever it decoded to is only compared where nothing was damaged.

#include "../../lmcache_ext/ops/csrc/lossless.cpp"

#include <cstdio>
#include <random>
#include <vector>

namespace {

using Bytes = std::vector<uint8_t>;

Bytes row_of(std::mt19937_64& random, int64_t bytes) {
  Bytes row(static_cast<size_t>(bytes));
  const uint64_t kind = random() % 4;  // noise, a constant, few values, a slope of exponents
  for (size_t i = 0; i < row.size(); ++i) {
    const uint64_t r = random();
    row[i] = static_cast<uint8_t>(kind == 0 ? r : kind == 1 ? 7 : kind == 2 ? r % 5 * r % 3 : 60 + (i & 1) * (r % 8));
  }
  return row;
}

void damage(std::mt19937_64& random, Bytes* payload) {
  for (uint64_t times = 1 + random() % 4; times > 0; --times) {
    if (payload->empty()) return;
    // headers, directories and tables are where a lie goes far: half of the hits are there
    const size_t reach = random() % 2 ? payload->size() : std::min<size_t>(payload->size(), 64);
    const size_t at = random() % reach;
    switch (random() % 5) {
      case 0: (*payload)[at] ^= static_cast<uint8_t>(1u << random() % 8); break;
      case 1: (*payload)[at] = static_cast<uint8_t>(random()); break;
      case 2: (*payload)[at] = random() % 2 ? 0 : 255; break;
      case 3: payload->resize(at); break;
      default: payload->insert(payload->begin() + static_cast<int64_t>(at), static_cast<uint8_t>(random()));
    }
  }
}

int attack(std::mt19937_64& random) {
  const int64_t element_bytes = int64_t{1} << random() % 3;
  const int64_t segment = random() % 2 ? 4096 : 1 + static_cast<int64_t>(random() % 700);
  const Bytes row = row_of(random, static_cast<int64_t>(random() % 9000));
  const auto size = static_cast<int64_t>(row.size());
  Bytes payload(static_cast<size_t>(size + 16 + 4 * element_bytes * (size / element_bytes / segment + 1)));
  const int64_t written = kvx_lossless_encode(row.data(), size, element_bytes, segment, payload.data(),
                                              static_cast<int64_t>(payload.size()));
  if (written < 0) return std::printf("refused an honest row: %ld\n", static_cast<long>(written));
  payload.resize(static_cast<size_t>(written));
  const auto isa = static_cast<int32_t>(1 + random() % static_cast<uint64_t>(kvx_lossless_isa()));
  Bytes back(row.size());
  const int64_t decoded = kvx_lossless_decode(payload.data(), written, back.data(), size, isa);
  if (decoded != size || back != row) return std::printf("isa %d lost an honest row\n", isa);
  for (int i = 0; i < 20; ++i) {
    Bytes damaged = payload;
    damage(random, &damaged);
    damaged.shrink_to_fit();
    const int64_t answer = kvx_lossless_decode(damaged.data(), static_cast<int64_t>(damaged.size()),
                                               back.data(), size, isa);
    if (answer != size && (answer >= 0 || answer < kBadBody)) {
      return std::printf("answered %ld\n", static_cast<long>(answer));
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  std::mt19937_64 random(std::strtoull(argv[2], nullptr, 10));
  for (long round = std::atol(argv[1]); round > 0; --round) {
    if (attack(random) != 0) return 1;
  }
  std::puts("unharmed");
}
