// Numbers of eight bits: a sign, 4 bits of exponent biased by 7, 3 of mantissa; no infinities, 448 the largest.
//
// Without branches, so that compilers make vectors of loops over them.

#pragma once

#include "elements.h"

namespace kvx {

constexpr float kE4m3Most = 448.0f;

// To the nearest, ties to the even code, saturating; of a finite number.
KVX_DEVICE uint8_t to_e4m3(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rest = bits & 0x7fffffff;
  const uint32_t normal = ((rest + 0x7ffff + (rest >> 20 & 1)) - 0x3c000000) >> 20;
  const uint32_t small = bits_of(of_bits(rest) + 16384.0f) - 0x46800000;  // rounded to a multiple of 2^-9
  const uint32_t code = rest < 0x3c800000 ? small : normal;               // below 2^-6, or not
  return static_cast<uint8_t>((bits >> 24 & 0x80) | (rest >= 0x43e00000 ? 0x7e : code));
}

// The two codes that are no numbers, 0x7f and 0xff, are never written and read as 480.
KVX_DEVICE float from_e4m3(uint8_t code) {
  const uint32_t sign = static_cast<uint32_t>(code & 0x80) << 24;
  return of_bits(sign | bits_of(of_bits(static_cast<uint32_t>(code & 0x7f) << 20) * of_bits(0x7b800000)));
}

// What elements of this largest magnitude are divided by; 0 where they are too small to be told from nothing.
KVX_DEVICE float e4m3_scale(float most) {
  const float scale = most / kE4m3Most;
  return scale > 0x1p-120f ? scale : 0.0f;
}

KVX_DEVICE float e4m3_inverse(float scale) { return scale > 0.0f ? 1.0f / scale : 0.0f; }

}  // namespace kvx
