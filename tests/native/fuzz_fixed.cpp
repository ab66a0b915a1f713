// Attacks the fixed-rate codecs under a sanitizer: payloads of noise, of wrong lengths, with damaged headers.
//
//     fuzz_fixed ROUNDS SEED
//
// Every buffer has exactly the size it is said to have, so the sanitizer sees the first byte beyond.

#include "../../lmcache_ext/ops/csrc/fixed.cpp"

#include <algorithm>
#include <cstdio>
#include <random>
#include <vector>

namespace {

struct Scene {
  std::vector<int64_t> cells;
  std::vector<int32_t> k_index, v_index;
  kvx_layout layout;

  explicit Scene(std::mt19937_64& random) {
    const auto below = [&](uint64_t most) { return static_cast<int32_t>(1 + random() % most); };
    layout = {0, nullptr, nullptr, nullptr, static_cast<int32_t>(random() % 3), below(2), below(2), below(2),
              below(40), below(40), below(40)};
    const int64_t bytes = layout.dtype == kFloat32 ? 4 : 2;
    k_index.resize(static_cast<size_t>(layout.tokens * layout.k_dim));
    v_index.resize(static_cast<size_t>(layout.tokens * layout.v_dim));
    int32_t next = 0;
    for (auto* index : {&k_index, &v_index}) {
      for (int32_t& place : *index) place = next++;
      std::shuffle(index->begin(), index->end(), random);
    }
    for (int64_t i = 0; i < num_cells(layout); ++i) cells.push_back(i * next * bytes);
    layout.row_bytes = static_cast<int64_t>(cells.size()) * next * bytes;
    layout.cells = cells.data(), layout.k_index = k_index.data(), layout.v_index = v_index.data();
  }
};

int attack(std::mt19937_64& random) {
  const Scene scene(random);
  const auto scheme = static_cast<int32_t>(random() % 4);
  std::vector<uint8_t> row(static_cast<size_t>(scene.layout.row_bytes));
  for (uint8_t& byte : row) byte = static_cast<uint8_t>(random());
  std::vector<uint8_t> payload(static_cast<size_t>(kvx_fixed_bytes(&scene.layout, scheme)));
  const auto size = static_cast<int64_t>(payload.size());
  if (kvx_fixed_encode(&scene.layout, scheme, row.data(), payload.data(), size) != 0) return 1;
  for (size_t i = kHeaderBytes; i < payload.size(); ++i) payload[i] = static_cast<uint8_t>(random());
  if (kvx_fixed_decode(&scene.layout, scheme, payload.data(), size, row.data()) != 0) return 2;
  payload[random() % kHeaderBytes] ^= static_cast<uint8_t>(1u << random() % 8);
  if (kvx_fixed_decode(&scene.layout, scheme, payload.data(), size, row.data()) == 0) return 3;
  payload.resize(random() % payload.size());
  payload.shrink_to_fit();
  return kvx_fixed_decode(&scene.layout, scheme, payload.data(), static_cast<int64_t>(payload.size()), row.data()) == 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  std::mt19937_64 random(std::strtoull(argv[2], nullptr, 10));
  for (long round = std::atol(argv[1]); round > 0; --round) {
    if (const int where = attack(random)) return std::printf("failed at %d\n", where);
  }
  std::puts("unharmed");
}
