// The symbol models of cachegen: 32 bell curves that every chunk shares, so that none brings a table along.
//
// A symbol is a residual in steps, -127 .. 127, plus 127; 255 is the escape for what lies beyond. Class k fits residuals
// of a standard deviation of 2^((k - 10) / 4) steps. Weights come from integer recursions over the literals below, and
// are the same on every machine.

#pragma once

#include <cstdint>
#include <memory>
#include <utility>

#include "rans_model.h"

namespace kvx {

constexpr int kClasses = 32;
constexpr int32_t kReach = 127;  // residuals beyond it escape
constexpr uint8_t kEscape = 255;

// 2^30 * exp(-1 / (2 sigma^2)): by how much a curve has fallen one step from its middle.
constexpr uint64_t kFall[kClasses] = {
    121,        13104,      360200,     3751106,    19666268,   63464312,   145315154,  261044606,
    395007542,  529428476,  651257337,  753969162,  836230973,  899760092,  947573834,  982908970,
    1008687096, 1027321989, 1040706261, 1050275481, 1057095000, 1061943836, 1065385899, 1067826536,
    1069555701, 1070780095, 1071646719, 1072259937, 1072693760, 1073000625, 1073217664, 1073371160};

// Weights of residuals 0 .. 127 of a class, the middle being 2^30: w(j + 1) = w(j) * fall^(2j + 1), truncated.
// A fiftieth of a curve twice as wide is mixed in: what is far from the middle is likelier than a bell says.
inline void weigh(int k, uint64_t* weights) {
  const int wide = k + 4 < kClasses ? k + 4 : kClasses - 1;
  for (int32_t j = 0; j <= kReach; ++j) weights[j] = 0;
  for (const auto& [curve, share] : {std::pair<int, uint64_t>{k, 49}, {wide, 1}}) {
    uint64_t weight = 1u << 30, factor = kFall[curve];
    const uint64_t square = kFall[curve] * kFall[curve] >> 30;
    for (int32_t j = 0; j <= kReach; ++j) {
      weights[j] += weight * share;
      weight = weight * factor >> 30;
      factor = factor * square >> 30;
    }
  }
}

// Frequencies of a class: of the weights above a 2^14th of the middle's, and one of the escape.
inline void fit_class(int k, rans::Model* model) {
  uint64_t weights[kReach + 1];
  weigh(k, weights);
  uint32_t counts[rans::kMaxSymbols] = {};
  uint32_t total = 1;
  counts[kEscape] = 1;
  for (int32_t j = 0; j <= kReach; ++j) {
    const auto count = static_cast<uint32_t>(weights[j] * 16384 / weights[0]);
    counts[kReach + j] = counts[kReach - j] = count;
    total += j == 0 ? count : 2 * count;
  }
  rans::fit(counts, total, model);
}

// Weights fall from the middle on, so those that are left stand side by side.
inline int32_t reach_of(const rans::Model& model) {
  int32_t reach = 0;
  while (reach < kReach && model.frequency[kReach + reach + 1] != 0) ++reach;
  return reach;
}

struct Models {
  rans::WideEntries wide[kClasses];
  rans::Model model[kClasses];
  int32_t reach[kClasses];  // residuals from -reach to reach have a frequency
  rans::EncodeEntry encode[kClasses][rans::kMaxSymbols];
  rans::DecodeTable decode[kClasses];
};

// All of them, made at the first call; 750 KiB.
inline const Models& models() {
  static const std::unique_ptr<const Models> made = [] {
    auto all = std::make_unique<Models>();
    for (int k = 0; k < kClasses; ++k) {
      fit_class(k, &all->model[k]);
      all->reach[k] = reach_of(all->model[k]);
      rans::fill(all->model[k], &all->wide[k]);
      rans::fill(all->model[k], all->encode[k]);
      rans::fill(all->model[k], &all->decode[k]);
    }
    return all;
  }();
  return *made;
}

}  // namespace kvx
