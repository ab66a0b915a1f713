// What the attacks on codecs have in common: layouts to code rows of, damage, rounds.
//
// Every buffer has exactly the size it is said to have, so the sanitizer sees the first byte beyond.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../../lmcache_ext/ops/csrc/elements.h"

namespace fuzz {

using Bytes = std::vector<uint8_t>;
using Random = std::mt19937_64;

// A layout whose elements are shuffled within their cells, or lie in runs.
struct Scene {
  std::vector<int64_t> cells;
  std::vector<int32_t> k_index, v_index;
  kvx_layout layout;

  Scene(Random& random, uint64_t most_heads, uint64_t most_blocks, uint64_t most_tokens, uint64_t most_dim) {
    const auto below = [&](uint64_t most) { return static_cast<int32_t>(1 + random() % most); };
    layout = {0, nullptr, nullptr, nullptr, static_cast<int32_t>(random() % 3), below(2), below(most_heads),
              below(most_blocks), below(most_tokens), below(most_dim), below(most_dim)};
    const int64_t bytes = layout.dtype == kvx::kFloat32 ? 4 : 2;
    const bool shuffled = random() % 2;
    for (int32_t* dim : {&layout.k_dim, &layout.v_dim}) {
      if (!shuffled) *dim = static_cast<int32_t>((*dim + kvx::kRun - 1) / kvx::kRun * kvx::kRun);
    }
    k_index.resize(static_cast<size_t>(layout.tokens * layout.k_dim));
    v_index.resize(static_cast<size_t>(layout.tokens * layout.v_dim));
    int32_t next = 0;
    for (auto* index : {&k_index, &v_index}) {
      for (int32_t& place : *index) place = next++;
      if (shuffled) std::shuffle(index->begin(), index->end(), random);
    }
    for (int64_t i = 0; i < kvx::num_cells(layout); ++i) cells.push_back(i * next * bytes);
    layout.row_bytes = static_cast<int64_t>(cells.size()) * next * bytes;
    layout.cells = cells.data(), layout.k_index = k_index.data(), layout.v_index = v_index.data();
  }
};

inline Bytes noise(Random& random, int64_t bytes) {
  Bytes row(static_cast<size_t>(bytes));
  for (uint8_t& byte : row) byte = static_cast<uint8_t>(random());
  return row;
}

// Up to four hits; half of them among the first `head` bytes, where a lie goes far.
inline Bytes damaged(Random& random, Bytes payload, size_t head) {
  for (uint64_t times = 1 + random() % 4; times > 0 && !payload.empty(); --times) {
    const size_t reach = random() % 2 ? payload.size() : std::min(payload.size(), head);
    const size_t at = random() % reach;
    switch (random() % 5) {
      case 0: payload[at] ^= static_cast<uint8_t>(1u << random() % 8); break;
      case 1: payload[at] = static_cast<uint8_t>(random()); break;
      case 2: payload[at] = random() % 2 ? 0 : 255; break;
      case 3: payload.resize(at); break;
      default: payload.insert(payload.begin() + static_cast<int64_t>(at), static_cast<uint8_t>(random()));
    }
  }
  payload.shrink_to_fit();
  return payload;
}

// PROGRAM ROUNDS SEED. An attack prints what went wrong and returns false.
template <typename Attack>
int rounds(int argc, char** argv, const Attack& attack) {
  if (argc != 3) return 2;
  Random random(std::strtoull(argv[2], nullptr, 10));
  for (long round = std::atol(argv[1]); round > 0; --round) {
    if (!attack(random)) return 1;
  }
  std::puts("unharmed");
  return 0;
}

inline bool failed(const char* what, int64_t number = 0) {
  std::printf("%s: %ld\n", what, static_cast<long>(number));
  return false;
}

}  // namespace fuzz
