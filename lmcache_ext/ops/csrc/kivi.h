// KIVI's groups on a host, as many side by side as vectors take: to the bit what fixed.h's groups are one by one.
//
// Keys: channels lie side by side in x, so a step of every loop is one token of kSide channels, and the words of their
// groups are put in place at the end. Values: a whole group lies in one piece.

#pragma once

#include "fixed.h"

namespace kvx {
namespace fixed {

constexpr int64_t kSide = 64;
constexpr int64_t kWordBits = 32;
constexpr int64_t kWords = kGroup * 4 / kWordBits;  // of the levels of a group, at most

// Ends and levels of groups of kSide channels: ends first, then levels, word by word.
using Words = uint32_t[1 + kWords][kSide];

template <int bits>
void fold_channels(const float* x, int64_t dim, int64_t tokens, int64_t width, Words words) {
  float least[kSide], most[kSide], inverse[kSide];
  for (int64_t c = 0; c < width; ++c) least[c] = most[c] = x[c];
  for (int64_t t = 1; t < tokens; ++t) {
    for (int64_t c = 0; c < width; ++c) {
      const float value = x[t * dim + c];
      least[c] = value < least[c] ? value : least[c];
      most[c] = value > most[c] ? value : most[c];
    }
  }
  for (int64_t c = 0; c < width; ++c) {
    const Ends ends = ends_of<bits>(least[c], most[c]);
    words[0][c] = ends.least | static_cast<uint32_t>(ends.step) << 16;
    least[c] = from_bfloat16(ends.least);
    inverse[c] = inverse_of(ends);
  }
  constexpr int64_t kOfWord = kWordBits / bits;
  for (int64_t t = 0; t < tokens; ++t) {
    uint32_t* const word = words[1 + t / kOfWord];
    const auto shift = static_cast<int>(t % kOfWord) * bits;
    if (shift == 0) std::memset(word, 0, kSide * sizeof(*word));
    for (int64_t c = 0; c < width; ++c) word[c] |= level_of<bits>(x[t * dim + c], least[c], inverse[c]) << shift;
  }
}

template <int bits>
void unfold_channels(const Words words, int64_t dim, int64_t tokens, int64_t width, float* x) {
  float least[kSide], step[kSide];
  for (int64_t c = 0; c < width; ++c) {
    least[c] = tame(from_bfloat16(static_cast<uint16_t>(words[0][c])));
    step[c] = tame(from_bfloat16(static_cast<uint16_t>(words[0][c] >> 16)));
  }
  constexpr int64_t kOfWord = kWordBits / bits;
  for (int64_t t = 0; t < tokens; ++t) {
    const uint32_t* const word = words[1 + t / kOfWord];
    const auto shift = static_cast<int>(t % kOfWord) * bits;
    for (int64_t c = 0; c < width; ++c) {
      const auto level = static_cast<int32_t>(word[c] >> shift & ((1u << bits) - 1));
      x[t * dim + c] = tame(least[c] + static_cast<float>(level) * step[c]);
    }
  }
}

// The group of one channel: bytes [0, bytes) at `to` from its words, the last of which may be a part of one.
inline void put_words(const Words words, int64_t channel, int64_t bytes, uint8_t* to) {
  for (int64_t at = 0; at < bytes; at += 4) {
    const uint32_t word = words[at / 4][channel];
    std::memcpy(to + at, &word, static_cast<size_t>(bytes - at < 4 ? bytes - at : 4));
  }
}

inline void take_words(const uint8_t* from, int64_t channel, int64_t bytes, Words words) {
  for (int64_t at = 0; at < bytes; at += 4) {
    uint32_t word = 0;
    std::memcpy(&word, from + at, static_cast<size_t>(bytes - at < 4 ? bytes - at : 4));
    words[at / 4][channel] = word;
  }
}

// Calls work(group, width) for each group of tokens of each kSide channels: that of the first, and how many there are.
template <int bits, typename Work>
void each_side(const Walk& walk, const Work& work) {
  for (int64_t first = 0; first < walk.lines; first += kSide) {
    const int64_t width = walk.lines - first < kSide ? walk.lines - first : kSide;
    for (int64_t i = 0; i < walk.groups_of_line(); ++i) work(group_of(walk, bits, first, i), width);
  }
}

template <int bits>
void encode_keys(const Walk& walk, const float* x, uint8_t* out) {
  const int64_t line = line_bytes(walk.length, bits);
  each_side<bits>(walk, [&](const Group& group, int64_t width) {
    Words words;
    fold_channels<bits>(x + group.first, group.stride, group.count, width, words);
    const int64_t bytes = group_bytes(group.count, bits);
    for (int64_t c = 0; c < width; ++c) put_words(words, c, bytes, out + group.at + c * line);
  });
}

template <int bits>
void decode_keys(const Walk& walk, const uint8_t* in, float* x) {
  const int64_t line = line_bytes(walk.length, bits);
  each_side<bits>(walk, [&](const Group& group, int64_t width) {
    Words words;
    const int64_t bytes = group_bytes(group.count, bits);
    for (int64_t c = 0; c < width; ++c) take_words(in + group.at + c * line, c, bytes, words);
    unfold_channels<bits>(words, group.stride, group.count, width, x + group.first);
  });
}

// As an integer that orders finite floats, for what compilers make vectors of; its own inverse.
inline int32_t ordered(int32_t bits) { return bits ^ (bits >> 31 & 0x7fffffff); }

// A whole group of a value: x[0, kGroup).
template <int bits>
void fold_value(const float* x, uint8_t* out) {
  int32_t least = INT32_MAX, most = INT32_MIN;
  for (int64_t i = 0; i < kGroup; ++i) {
    const int32_t value = ordered(static_cast<int32_t>(bits_of(x[i])));
    least = value < least ? value : least;
    most = value > most ? value : most;
  }
  const auto number = [](int32_t order) { return of_bits(static_cast<uint32_t>(ordered(order))); };
  const Ends ends = ends_of<bits>(number(least), number(most));
  store(out, ends);
  const float zero = from_bfloat16(ends.least), inverse = inverse_of(ends);
  uint8_t levels[kGroup];
  for (int64_t i = 0; i < kGroup; ++i) levels[i] = static_cast<uint8_t>(level_of<bits>(x[i], zero, inverse));
  uint8_t packed[kGroup * bits / 8];
  for (int64_t i = 0; i < kGroup * bits / 8; ++i) {
    if constexpr (bits == 4) {
      const auto two = load<uint16_t>(levels + 2 * i);
      packed[i] = static_cast<uint8_t>(two | two >> 4);
    } else {
      const auto four = load<uint32_t>(levels + 4 * i);
      packed[i] = static_cast<uint8_t>(four | four >> 6 | four >> 12 | four >> 18);
    }
  }
  std::memcpy(out + 4, packed, sizeof(packed));
}

template <int bits>
void unfold_value(const uint8_t* in, float* x) {
  uint8_t packed[kGroup * bits / 8], levels[kGroup];
  std::memcpy(packed, in + 4, sizeof(packed));
  for (int64_t i = 0; i < kGroup * bits / 8; ++i) {
    if constexpr (bits == 4) {
      store(levels + 2 * i, static_cast<uint16_t>((packed[i] | packed[i] << 4) & 0x0f0f));
    } else {
      const uint32_t four = packed[i];
      store(levels + 4 * i, (four | four << 6 | four << 12 | four << 18) & 0x03030303);
    }
  }
  const auto ends = load<Ends>(in);
  const float least = tame(from_bfloat16(ends.least)), step = tame(from_bfloat16(ends.step));
  for (int64_t i = 0; i < kGroup; ++i) x[i] = tame(least + static_cast<float>(levels[i]) * step);
}

template <typename Work>
void each_group(const Walk& walk, int bits, const Work& work) {
  for (int64_t line = 0; line < walk.lines; ++line) {
    for (int64_t i = 0; i < walk.groups_of_line(); ++i) work(group_of(walk, bits, line, i));
  }
}

template <int bits>
void encode_values(const Walk& walk, const float* x, uint8_t* out) {
  each_group(walk, bits, [&](const Group& group) {
    const float* const from = x + group.first;
    if (group.count == kGroup) return fold_value<bits>(from, out + group.at);
    encode_group<bits>(group.count, [&](int64_t i) { return from[i]; }, out + group.at);
  });
}

template <int bits>
void decode_values(const Walk& walk, const uint8_t* in, float* x) {
  each_group(walk, bits, [&](const Group& group) {
    float* const to = x + group.first;
    if (group.count == kGroup) return unfold_value<bits>(in + group.at, to);
    decode_group<bits>(in + group.at, group.count, [&](int64_t i, float y) { to[i] = y; });
  });
}

template <int bits>
void encode_kivi(bool keys, int64_t tokens, int64_t dim, const float* x, uint8_t* out) {
  const Walk walk = walk_of(keys, tokens, dim);
  keys ? encode_keys<bits>(walk, x, out) : encode_values<bits>(walk, x, out);
}

template <int bits>
void decode_kivi(bool keys, int64_t tokens, int64_t dim, const uint8_t* in, float* x) {
  const Walk walk = walk_of(keys, tokens, dim);
  keys ? decode_keys<bits>(walk, in, x) : decode_values<bits>(walk, in, x);
}

}  // namespace fixed
}  // namespace kvx
