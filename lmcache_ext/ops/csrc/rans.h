// An entropy coder for bytes: range ANS with 32 interleaved lanes over one stream of 16-bit words.
//
//     symbols  s0 s1 ... s31 | s32 ... s63 | ...      symbol i belongs to lane i % 32
//     stream   32 lane states, u32 | words, u16       lanes take words in lane order, group by group
//
// 32 lanes are a warp, two AVX-512 registers or four AVX2 ones, and which of them decodes does not
// show in the bytes. A state lives in [2^16, 2^32); frequencies of a model sum to 2^12. A decoder that
// has read every symbol must have taken every word and be back in the state every encoder starts
// from, 2^16 in each lane: what was damaged or made up does not get there but by luck, and nothing
// is read or written out of bounds on the way.

#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"
#include "rans_model.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace rans {

using machine::best_isa;
using machine::Isa;

// ---- encoding

// Codes `count` symbols, the last first, into what ends at `out`, of which [begin, out) is free; returns where they
// begin, or null where there is no room. Every symbol must have a frequency in the model of the entries.
inline uint8_t* encode_onto(const uint8_t* symbols, int64_t count, const EncodeEntry* entries,
                            uint8_t* begin, uint8_t* out, uint32_t* states) {
  for (int64_t group = (count + kLanes - 1) / kLanes - 1; group >= 0; --group) {
    if (out - begin < 2 * kLanes) return nullptr;
    const uint8_t* const in = symbols + group * kLanes;
    const int64_t left = count - group * kLanes;
    for (int lane = static_cast<int>(left < kLanes ? left : kLanes) - 1; lane >= 0; --lane) {
      const EncodeEntry& entry = entries[in[lane]];
      uint32_t x = states[lane];
      const bool full = x >= entry.limit;
      const auto word = static_cast<uint16_t>(x);
      std::memcpy(out - 2, &word, 2);  // written always, kept where the state was full
      out -= full ? 2 : 0;
      x = full ? x >> 16 : x;
      const auto quotient = static_cast<uint32_t>(
          static_cast<unsigned __int128>(x) * entry.reciprocal >> 64);
      states[lane] = x + entry.bias + quotient * entry.complement;
    }
  }
  return out;
}

#if defined(__x86_64__)

#define RANS_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,popcnt")))

// Sixteen lanes, whose words end at `out`; returns where they begin.
RANS_AVX512 inline uint8_t* code_avx512(const uint8_t* symbols, const WideEntries& entries, uint8_t* out, __m512i* x) {
  const __m512i symbol = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(symbols)));
  const __m512i packed = _mm512_i32gather_epi32(symbol, entries.packed, 4);
  const __m512i frequency = _mm512_and_si512(packed, _mm512_set1_epi32(0xffff));
  const __mmask16 full = _mm512_cmpge_epu32_mask(*x, _mm512_slli_epi32(frequency, 32 - kBits));
  const int words = __builtin_popcount(full);
  out -= 2 * words;
  const __m256i shed = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(full, *x));
  _mm256_mask_storeu_epi16(out, static_cast<__mmask16>((1u << words) - 1), shed);
  const __m512i y = _mm512_mask_srli_epi32(*x, full, *x, 16);
  const __m512d low = _mm512_mul_pd(_mm512_cvtepu32_pd(_mm512_castsi512_si256(y)),
                                    _mm512_i32gather_pd(_mm512_castsi512_si256(symbol), entries.reciprocal, 8));
  const __m512d high = _mm512_mul_pd(_mm512_cvtepu32_pd(_mm512_extracti64x4_epi64(y, 1)),
                                     _mm512_i32gather_pd(_mm512_extracti64x4_epi64(symbol, 1), entries.reciprocal, 8));
  const __m512i quotient =
      _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvttpd_epu32(low)), _mm512_cvttpd_epu32(high), 1);
  const __m512i complement = _mm512_sub_epi32(_mm512_set1_epi32(kTotal), frequency);
  const __m512i start = _mm512_srli_epi32(packed, 16);
  *x = _mm512_add_epi32(_mm512_add_epi32(y, start), _mm512_mullo_epi32(quotient, complement));
  return out;
}

// As encode_onto, of whole groups.
RANS_AVX512 inline uint8_t* encode_avx512(const uint8_t* symbols, int64_t groups, const WideEntries& entries,
                                          const uint8_t* begin, uint8_t* out, uint32_t* states) {
  __m512i x[2];
  std::memcpy(x, states, sizeof(x));
  for (int64_t group = groups - 1; group >= 0; --group) {
    if (out - begin < 2 * kLanes) return nullptr;
    out = code_avx512(symbols + group * kLanes + kLanes / 2, entries, out, &x[1]);
    out = code_avx512(symbols + group * kLanes, entries, out, &x[0]);
  }
  std::memcpy(states, x, sizeof(x));
  return out;
}

#endif  // __x86_64__

// As encode_onto, on the instruction set `isa`.
template <Isa isa>
inline uint8_t* encode_onto(const uint8_t* symbols, int64_t count, const EncodeEntry* entries, const WideEntries& wide,
                            uint8_t* begin, uint8_t* out, uint32_t* states) {
#if defined(__x86_64__)
  if constexpr (isa == Isa::kAvx512) {
    const int64_t groups = count / kLanes;
    if (count % kLanes != 0) {
      out = encode_onto(symbols + groups * kLanes, count % kLanes, entries, begin, out, states);
    }
    return out == nullptr ? nullptr : encode_avx512(symbols, groups, wide, begin, out, states);
  }
#endif
  return encode_onto(symbols, count, entries, begin, out, states);
}

// Puts the states before the words that begin at `out`; returns where the stream begins, or null.
inline uint8_t* finish(const uint8_t* begin, uint8_t* out, const uint32_t* states) {
  if (out - begin < kStateBytes) return nullptr;
  std::memcpy(out - kStateBytes, states, kStateBytes);
  return out - kStateBytes;
}

// One stream of symbols under one model, in the end of [begin, end); null where there is no room.
template <Isa isa>
inline uint8_t* encode(const uint8_t* symbols, int64_t count, const EncodeEntry* entries, const WideEntries& wide,
                       uint8_t* begin, uint8_t* end) {
  uint32_t states[kLanes];
  for (uint32_t& state : states) state = kLow;
  uint8_t* const out = encode_onto<isa>(symbols, count, entries, wide, begin, end, states);
  return out == nullptr ? nullptr : finish(begin, out, states);
}

// ---- decoding

struct Reader {
  const uint8_t* words;
  const uint8_t* end;
  uint32_t states[kLanes];
};

// One group of up to 32 symbols, every word checked; false where the words run out.
inline bool decode_group(Reader* reader, const DecodeTable& table, uint8_t* out, int64_t lanes) {
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const uint32_t entry = table.slot[reader->states[lane] & (kTotal - 1)];
    uint32_t x = (entry >> 20) * (reader->states[lane] >> kBits) + (entry >> 8 & (kTotal - 1));
    out[lane] = static_cast<uint8_t>(entry);
    if (x < kLow) {
      if (reader->end - reader->words < 2) return false;
      uint16_t word;
      std::memcpy(&word, reader->words, 2);
      reader->words += 2;
      x = x << 16 | word;
    }
    reader->states[lane] = x;
  }
  return true;
}

// Whole groups while 32 words are surely left; returns how many symbols were decoded.
inline int64_t decode_scalar(Reader* reader, const DecodeTable& table, uint8_t* out,
                             int64_t count) {
  int64_t done = 0;
  const uint8_t* words = reader->words;
  uint32_t states[kLanes];
  std::memcpy(states, reader->states, sizeof(states));
  for (; done + kLanes <= count && reader->end - words >= 2 * kLanes; done += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint32_t entry = table.slot[states[lane] & (kTotal - 1)];
      const uint32_t x = (entry >> 20) * (states[lane] >> kBits) + (entry >> 8 & (kTotal - 1));
      out[done + lane] = static_cast<uint8_t>(entry);
      uint16_t word;
      std::memcpy(&word, words, 2);
      const bool low = x < kLow;
      states[lane] = low ? x << 16 | word : x;
      words += low ? 2 : 0;
    }
  }
  std::memcpy(reader->states, states, sizeof(states));
  reader->words = words;
  return done;
}

#if defined(__x86_64__)

// For each set of lanes that take a word: which word each of the eight takes.
struct Permutations {
  uint64_t of[256];
  constexpr Permutations() : of() {
    for (int mask = 0; mask < 256; ++mask) {
      uint64_t next = 0;
      for (int lane = 0; lane < 8; ++lane) {
        if (mask >> lane & 1) of[mask] |= next++ << (8 * lane);
      }
    }
  }
};
inline constexpr Permutations kPermutations;

__attribute__((target("avx2,popcnt"))) inline __m256i step_avx2(__m256i* x, const uint8_t** words,
                                                        const DecodeTable& table) {
  const __m256i low_bits = _mm256_set1_epi32(kTotal - 1);
  const __m256i slots = _mm256_and_si256(*x, low_bits);
  const __m256i entry =
      _mm256_i32gather_epi32(reinterpret_cast<const int*>(table.slot), slots, 4);
  __m256i next = _mm256_mullo_epi32(_mm256_srli_epi32(entry, 20), _mm256_srli_epi32(*x, kBits));
  next = _mm256_add_epi32(next, _mm256_and_si256(_mm256_srli_epi32(entry, 8), low_bits));
  const __m256i low = _mm256_cmpeq_epi32(_mm256_srli_epi32(next, 16), _mm256_setzero_si256());
  const auto mask = static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(low)));
  const __m256i taken =
      _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(*words)));
  const __m256i order = _mm256_cvtepu8_epi32(
      _mm_loadl_epi64(reinterpret_cast<const __m128i*>(&kPermutations.of[mask])));
  const __m256i word = _mm256_permutevar8x32_epi32(taken, order);
  const __m256i shifted = _mm256_or_si256(_mm256_slli_epi32(next, 16), word);
  *x = _mm256_blendv_epi8(next, shifted, low);
  *words += 2 * __builtin_popcount(mask);
  return _mm256_and_si256(entry, _mm256_set1_epi32(0xff));
}

__attribute__((target("avx2,popcnt"))) inline int64_t decode_avx2(Reader* reader,
                                                          const DecodeTable& table, uint8_t* out,
                                                          int64_t count) {
  int64_t done = 0;
  const uint8_t* words = reader->words;
  __m256i x[4];
  std::memcpy(x, reader->states, sizeof(x));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (; done + kLanes <= count && reader->end - words >= 2 * kLanes; done += kLanes) {
    const __m256i a = step_avx2(&x[0], &words, table), b = step_avx2(&x[1], &words, table);
    const __m256i c = step_avx2(&x[2], &words, table), d = step_avx2(&x[3], &words, table);
    const __m256i bytes =
        _mm256_packus_epi16(_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + done),
                        _mm256_permutevar8x32_epi32(bytes, order));
  }
  std::memcpy(reader->states, x, sizeof(x));
  reader->words = words;
  return done;
}

__attribute__((target("avx512f,avx512bw,avx512vl,popcnt"))) inline __m128i step_avx512(
    __m512i* x, const uint8_t** words, const DecodeTable& table) {
  const __m512i low_bits = _mm512_set1_epi32(kTotal - 1);
  const __m512i entry = _mm512_i32gather_epi32(_mm512_and_si512(*x, low_bits), table.slot, 4);
  __m512i next = _mm512_mullo_epi32(_mm512_srli_epi32(entry, 20), _mm512_srli_epi32(*x, kBits));
  next = _mm512_add_epi32(next, _mm512_and_si512(_mm512_srli_epi32(entry, 8), low_bits));
  const __mmask16 low = _mm512_cmplt_epu32_mask(next, _mm512_set1_epi32(kLow));
  const __m512i taken =
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(*words)));
  const __m512i word = _mm512_maskz_expand_epi32(low, taken);
  *x = _mm512_mask_or_epi32(next, low, _mm512_slli_epi32(next, 16), word);
  *words += 2 * __builtin_popcount(low);
  return _mm512_cvtepi32_epi8(entry);
}

__attribute__((target("avx512f,avx512bw,avx512vl,popcnt"))) inline int64_t decode_avx512(
    Reader* reader, const DecodeTable& table, uint8_t* out, int64_t count) {
  int64_t done = 0;
  const uint8_t* words = reader->words;
  __m512i x[2];
  std::memcpy(x, reader->states, sizeof(x));
  for (; done + kLanes <= count && reader->end - words >= 2 * kLanes; done += kLanes) {
    const __m128i a = step_avx512(&x[0], &words, table), b = step_avx512(&x[1], &words, table);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + done), a);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + done + 16), b);
  }
  std::memcpy(reader->states, x, sizeof(x));
  reader->words = words;
  return done;
}

#endif  // __x86_64__

// Starts reading the stream [stream, stream + bytes); false where it has no room for states.
inline bool open(const uint8_t* stream, int64_t bytes, Reader* reader) {
  if (bytes < kStateBytes) return false;
  reader->words = stream + kStateBytes;
  reader->end = stream + bytes;
  std::memcpy(reader->states, stream, kStateBytes);
  return true;
}

// Fills out[0, count) with the next symbols, lane 0 first; false where the words run out.
inline bool decode_from(Reader* reader, const DecodeTable& table, uint8_t* out, int64_t count,
                        Isa isa) {
  int64_t done = 0;
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) done = decode_avx512(reader, table, out, count);
  if (isa == Isa::kAvx2) done = decode_avx2(reader, table, out, count);
#endif
  if (done == 0) done = decode_scalar(reader, table, out, count);
  for (; done < count; done += kLanes) {
    const int64_t lanes = count - done < kLanes ? count - done : kLanes;
    if (!decode_group(reader, table, out + done, lanes)) return false;
  }
  return true;
}

// Whether every word was taken and every lane is back where encoders start.
inline bool at_end(const Reader& reader) {
  for (const uint32_t state : reader.states) {
    if (state != kLow) return false;
  }
  return reader.words == reader.end;
}

// Fills out[0, count) from the stream [stream, stream + bytes); false unless it ends as it must.
inline bool decode(const uint8_t* stream, int64_t bytes, const DecodeTable& table, uint8_t* out,
                   int64_t count, Isa isa) {
  Reader reader;
  return open(stream, bytes, &reader) && decode_from(&reader, table, out, count, isa) &&
         at_end(reader);
}

}  // namespace rans
