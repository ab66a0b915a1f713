// The models of the entropy coder in rans.h, and the tables that coders on hosts and GPUs make of them.

#pragma once

#include <cstdint>

namespace rans {

constexpr int kLanes = 32;
constexpr int kBits = 12;
constexpr uint32_t kTotal = 1u << kBits;
constexpr uint32_t kLow = 1u << 16;
constexpr int64_t kStateBytes = kLanes * 4;
constexpr int kMaxSymbols = 256;

// Frequencies of all bytes, summing to kTotal; none is kTotal itself (such a plane is a constant).
struct Model {
  uint16_t frequency[kMaxSymbols];
};

// What to do with each of the 2^12 slots: frequency << 20 | slot - start << 8 | symbol.
struct DecodeTable {
  uint32_t slot[kTotal];
};

// How to divide by a frequency without dividing: the high half of a product with 2^64 / frequency,
// rounded up, which is exact for states of 32 bits.
struct EncodeEntry {
  uint64_t reciprocal;
  uint32_t limit;       // a state from here on sheds a word first
  uint16_t bias;        // what a state gains besides quotient * complement
  uint16_t complement;  // kTotal - frequency
};

// The same for coders that divide many states at a time: the start of a frequency's interval << 16 | frequency.
struct WideEntries {
  double reciprocal[kMaxSymbols];
  uint32_t packed[kMaxSymbols];
};

// Scales counts (`total` of them, at least two symbols) to frequencies that sum to kTotal: rounded,
// at least one each, the difference settled with the most frequent symbol of the time.
inline void fit(const uint32_t* counts, uint32_t total, Model* model) {
  int32_t rest = static_cast<int32_t>(kTotal);
  for (int s = 0; s < kMaxSymbols; ++s) {
    const uint64_t scaled = (static_cast<uint64_t>(counts[s]) * kTotal * 2 + total) / (2ull * total);
    const uint64_t most = kTotal - 1;
    const uint64_t bounded = scaled > most ? most : scaled;
    model->frequency[s] = static_cast<uint16_t>(counts[s] == 0 ? 0 : (bounded == 0 ? 1 : bounded));
    rest -= model->frequency[s];
  }
  while (rest != 0) {
    int largest = 0;
    for (int s = 1; s < kMaxSymbols; ++s) {
      if (model->frequency[s] > model->frequency[largest]) largest = s;
    }
    // never below one, and never all of it: two symbols are present
    int32_t change = rest > 0 ? rest : -1;
    const int32_t room = static_cast<int32_t>(kTotal) - 1 - model->frequency[largest];
    if (change > room) change = room;
    model->frequency[largest] = static_cast<uint16_t>(model->frequency[largest] + change);
    rest -= change;
  }
}

// log2(kTotal / frequency) in 1/256 bits, rounded down in the logarithm: integers only, so that every
// encoder makes the same choices.
inline uint32_t cost_256ths(uint32_t frequency) {
  int whole = 31 - __builtin_clz(frequency);
  uint64_t x = (static_cast<uint64_t>(frequency) << 32) >> whole;  // [1, 2) in 32 binary places
  uint32_t fraction = 0;
  for (int i = 0; i < 8; ++i) {
    x = (x >> 16) * (x >> 16);  // squared; each squaring yields the next bit of the logarithm
    fraction <<= 1;
    if (x >= (2ull << 32)) {
      x >>= 1;
      fraction |= 1;
    }
  }
  return kBits * 256u - (static_cast<uint32_t>(whole) * 256u + fraction);
}

inline void fill(const Model& model, DecodeTable* table) {
  uint32_t start = 0;
  for (uint32_t s = 0; s < kMaxSymbols; ++s) {
    const uint32_t frequency = model.frequency[s];
    for (uint32_t i = 0; i < frequency; ++i) {
      table->slot[start + i] = frequency << 20 | i << 8 | s;
    }
    start += frequency;
  }
}

inline void fill(const Model& model, WideEntries* entries) {
  uint32_t start = 0;
  for (int s = 0; s < kMaxSymbols; ++s) {
    const uint32_t frequency = model.frequency[s];
    // A quotient is below 2^20, and at least 2^-12 below the next whole number where it is none. So a 2^40th too much,
    // which outweighs what rounding takes away, changes no whole part.
    entries->reciprocal[s] = frequency == 0 ? 0.0 : (1.0 + 0x1p-40) / frequency;
    entries->packed[s] = start << 16 | frequency;
    start += frequency;
  }
}

inline void fill(const Model& model, EncodeEntry* entries) {
  uint32_t start = 0;
  for (int s = 0; s < kMaxSymbols; ++s) {
    const uint32_t frequency = model.frequency[s];
    EncodeEntry& entry = entries[s];
    entry.limit = frequency << 20;
    entry.complement = static_cast<uint16_t>(kTotal - frequency);
    // 2^64 / 1 does not fit: one less makes the quotient x - 1, which the bias puts right
    entry.reciprocal = frequency < 2 ? ~0ull : ~0ull / frequency + 1;
    entry.bias = static_cast<uint16_t>(frequency < 2 ? start + kTotal - 1 : start);
    start += frequency;
  }
}

}  // namespace rans
