// Attacks the cachegen codec under a sanitizer: damaged payloads of honest rows.
//
//     fuzz_cachegen ROUNDS SEED
//
// Every buffer has exactly the size it is said to have, so the sanitizer sees the first byte beyond.

#include "../../lmcache_ext/ops/csrc/cachegen.cpp"

#include <cstdio>
#include <random>

namespace {

using Bytes = std::vector<uint8_t>;

struct Scene {
  std::vector<int64_t> cells;
  std::vector<int32_t> k_index, v_index;
  kvx_layout layout;

  explicit Scene(std::mt19937_64& random) {
    const auto below = [&](uint64_t most) { return static_cast<int32_t>(1 + random() % most); };
    layout = {0, nullptr, nullptr, nullptr, static_cast<int32_t>(random() % 3), below(2), below(3), below(3),
              below(70), below(20), below(20)};
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

void damage(std::mt19937_64& random, Bytes* payload) {
  for (uint64_t times = 1 + random() % 4; times > 0; --times) {
    if (payload->empty()) return;
    // headers, directories and lines are where a lie goes far: half of the hits are there
    const size_t reach = random() % 2 ? payload->size() : std::min<size_t>(payload->size(), 120);
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
  const Scene scene(random);
  const kvx_layout& layout = scene.layout;
  Bytes row(static_cast<size_t>(layout.row_bytes));
  for (uint8_t& byte : row) byte = static_cast<uint8_t>(random() % 2 ? random() : 0x3f);
  const std::vector<float> bins(static_cast<size_t>(2 * layout.layers), random() % 2 ? 12.0f : 200.0f);
  Bytes payload(row.size() * 4 + 8192);
  const int64_t written =
      kvx_cachegen_encode(&layout, bins.data(), row.data(), payload.data(), static_cast<int64_t>(payload.size()));
  if (written < 0) return std::printf("refused an honest row: %ld\n", static_cast<long>(written));
  payload.resize(static_cast<size_t>(written));
  const auto isa = static_cast<int32_t>(1 + random() % static_cast<uint64_t>(kvx_cachegen_isa()));
  if (kvx_cachegen_decode(&layout, payload.data(), written, row.data(), isa) != 0) return std::puts("lost a row");
  for (int i = 0; i < 20; ++i) {
    Bytes damaged = payload;
    damage(random, &damaged);
    damaged.shrink_to_fit();
    const int64_t answer =
        kvx_cachegen_decode(&layout, damaged.data(), static_cast<int64_t>(damaged.size()), row.data(), isa);
    if (answer > 0 || answer < kBadBody) return std::printf("answered %ld\n", static_cast<long>(answer));
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
