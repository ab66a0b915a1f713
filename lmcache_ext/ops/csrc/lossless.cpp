// Bytes of floating-point KV, smaller and bit for bit. See serde/README.md for the format.
//
// Elements are rotated left by one bit, so that the exponent fills their most significant byte
// (bfloat16, float32) or most of it (float16), and split into planes of one byte each. What lies in a
// plane is coded, if that pays: exponents of neighbours are alike, mantissas are noise and stay raw.
//
// Plain C interface; no state, scratch only on the heap of the call; safe in any number of threads.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "rans.h"

#define KVX_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int64_t kHeaderBytes = 16;
constexpr int64_t kVersion = 1;
constexpr int64_t kMaxSegment = 1 << 18;  // elements; bounds the scratch that a header can ask for
constexpr uint32_t kBodyMask = (1u << 30) - 1;
// A coded plane must save a 32nd: below it the time of decoding is not worth the bytes.
constexpr int64_t kWorth = 32;

enum Mode : uint32_t { kRaw = 0, kConstant = 1, kCoded = 2 };

// What a refused payload is told by; ops/lossless.py turns them into errors.
enum Refusal : int64_t {
  kTruncated = -1,
  kBadVersion = -2,
  kBadHeader = -3,
  kOtherLength = -4,
  kBadDirectory = -5,
  kBadBody = -6,
  kNoMemory = -7,
  kNoRoom = -8,
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <typename T>
using Buffer = std::unique_ptr<T, Free>;

template <typename T>
Buffer<T> allocate(int64_t count) {
  return Buffer<T>(static_cast<T*>(std::malloc(static_cast<size_t>(count) * sizeof(T))));
}

template <typename T>
T load(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

template <typename T>
void store(uint8_t* to, T value) {
  std::memcpy(to, &value, sizeof(T));
}

bool is_element(int64_t bytes) { return bytes == 1 || bytes == 2 || bytes == 4; }

int64_t num_segments(int64_t elements, int64_t segment) {
  return (elements + segment - 1) / segment;
}

// ---- planes: plane p holds byte p of each rotated element, least significant first

void split(const uint8_t* elements, int64_t count, int64_t element_bytes, uint8_t* const* planes) {
  if (element_bytes == 2) {
    uint8_t *low = planes[0], *high = planes[1];
    for (int64_t i = 0; i < count; ++i) {
      const auto x = load<uint16_t>(elements + 2 * i);
      low[i] = static_cast<uint8_t>(x << 1 | x >> 15);
      high[i] = static_cast<uint8_t>(x >> 7);
    }
  } else if (element_bytes == 4) {
    for (int64_t i = 0; i < count; ++i) {
      const auto x = load<uint32_t>(elements + 4 * i);
      const uint32_t rotated = x << 1 | x >> 31;
      for (int p = 0; p < 4; ++p) planes[p][i] = static_cast<uint8_t>(rotated >> 8 * p);
    }
  } else {
    std::memcpy(planes[0], elements, static_cast<size_t>(count));
  }
}

void merge(const uint8_t* const* planes, int64_t count, int64_t element_bytes, uint8_t* elements) {
  if (element_bytes == 2) {
    const uint8_t *low = planes[0], *high = planes[1];
    for (int64_t i = 0; i < count; ++i) {
      const auto x = static_cast<uint16_t>(low[i] | high[i] << 8);
      store(elements + 2 * i, static_cast<uint16_t>(x >> 1 | x << 15));
    }
  } else if (element_bytes == 4) {
    const uint8_t *a = planes[0], *b = planes[1], *c = planes[2], *d = planes[3];
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t x = static_cast<uint32_t>(a[i]) | static_cast<uint32_t>(b[i]) << 8 |
                         static_cast<uint32_t>(c[i]) << 16 | static_cast<uint32_t>(d[i]) << 24;
      store(elements + 4 * i, x >> 1 | x << 31);
    }
  } else {
    std::memcpy(elements, planes[0], static_cast<size_t>(count));
  }
}

// ---- one plane of one segment

void count_bytes(const uint8_t* plane, int64_t count, uint32_t* counts) {
  uint32_t part[4][rans::kMaxSymbols] = {};  // neighbours are often equal: four tables do not wait
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    for (int k = 0; k < 4; ++k) ++part[k][plane[i + k]];
  }
  for (; i < count; ++i) ++part[0][plane[i]];
  for (int s = 0; s < rans::kMaxSymbols; ++s) {
    counts[s] = part[0][s] + part[1][s] + part[2][s] + part[3][s];
  }
}

int num_symbols(const uint32_t* counts) {
  int present = 0;
  for (int s = 0; s < rans::kMaxSymbols; ++s) present += counts[s] != 0;
  return present;
}

int64_t table_bytes(int symbols) { return 2 + 3 * static_cast<int64_t>(symbols); }

// Bytes that the stream takes under the model, without its table: an estimate, rounded down.
int64_t estimated_bytes(const uint32_t* counts, const rans::Model& model) {
  uint64_t bits_256ths = 0;
  for (int s = 0; s < rans::kMaxSymbols; ++s) {
    if (counts[s] != 0) {
      bits_256ths += static_cast<uint64_t>(counts[s]) * rans::cost_256ths(model.frequency[s]);
    }
  }
  return static_cast<int64_t>(bits_256ths / (8 * 256)) + rans::kStateBytes;
}

uint8_t* write_table(const rans::Model& model, int symbols, uint8_t* out) {
  store(out, static_cast<uint16_t>(symbols));
  uint8_t* names = out + 2;
  uint8_t* frequencies = names + symbols;
  for (int s = 0; s < rans::kMaxSymbols; ++s) {
    if (model.frequency[s] == 0) continue;
    *names++ = static_cast<uint8_t>(s);
    store(frequencies, model.frequency[s]);
    frequencies += 2;
  }
  return frequencies;
}

// Writes the body of a plane at `out`, of which [out, end) is free; returns its directory entry, or a
// refusal. `scratch` holds at least 2 * count + 256 bytes.
template <rans::Isa isa>
int64_t encode_plane(const uint8_t* plane, int64_t count, uint8_t* scratch, int64_t scratch_bytes,
                     uint8_t* out, const uint8_t* end) {
  uint32_t counts[rans::kMaxSymbols];
  count_bytes(plane, count, counts);
  const int symbols = num_symbols(counts);
  if (symbols == 1) {
    if (end - out < 1) return kNoRoom;
    *out = plane[0];
    return static_cast<int64_t>(kConstant) << 30 | 1;
  }
  rans::Model model;
  rans::fit(counts, static_cast<uint32_t>(count), &model);
  const int64_t table = table_bytes(symbols);
  const int64_t expected = table + estimated_bytes(counts, model);
  if (expected <= count - count / kWorth - 1) {
    rans::EncodeEntry entries[rans::kMaxSymbols];
    rans::fill(model, entries);
    rans::WideEntries wide;
    if constexpr (isa == rans::Isa::kAvx512) rans::fill(model, &wide);
    const uint8_t* stream =
        rans::encode<isa>(plane, count, entries, wide, scratch, scratch + scratch_bytes);
    if (stream == nullptr) return kNoRoom;
    const int64_t stream_bytes = scratch + scratch_bytes - stream;
    if (end - out < table + stream_bytes) return kNoRoom;
    std::memcpy(write_table(model, symbols, out), stream, static_cast<size_t>(stream_bytes));
    return static_cast<int64_t>(kCoded) << 30 | (table + stream_bytes);
  }
  if (end - out < count) return kNoRoom;
  std::memcpy(out, plane, static_cast<size_t>(count));
  return static_cast<int64_t>(kRaw) << 30 | count;
}

// Bytes of the table at the beginning of a coded body, or 0 where it is none.
int64_t read_table(const uint8_t* body, int64_t bytes, rans::Model* model) {
  if (bytes < 2) return 0;
  const int symbols = load<uint16_t>(body);
  const int64_t table = table_bytes(symbols);
  if (symbols < 2 || symbols > rans::kMaxSymbols || bytes < table) return 0;
  std::memset(model, 0, sizeof(*model));
  uint32_t total = 0;
  for (int i = 0; i < symbols; ++i) {
    const uint8_t name = body[2 + i];
    const auto frequency = load<uint16_t>(body + 2 + symbols + 2 * i);
    if ((i > 0 && name <= body[1 + i]) || frequency == 0) return 0;
    model->frequency[name] = frequency;
    total += frequency;
  }
  return total == rans::kTotal ? table : 0;
}

// Fills plane[0, count) from a body; where that is not even needed, points `plane` at the body.
bool decode_plane(uint32_t mode, const uint8_t* body, int64_t bytes, int64_t count,
                  rans::DecodeTable* table, uint8_t* scratch, const uint8_t** plane,
                  rans::Isa isa) {
  *plane = scratch;
  if (mode == kRaw) {
    *plane = body;
    return bytes == count;
  }
  if (mode == kConstant) {
    if (bytes != 1) return false;
    std::memset(scratch, body[0], static_cast<size_t>(count));
    return true;
  }
  rans::Model model;
  const int64_t head = mode == kCoded ? read_table(body, bytes, &model) : 0;
  if (head == 0) return false;
  rans::fill(model, table);
  return rans::decode(body + head, bytes - head, *table, scratch, count, isa);
}

// ---- containers

struct Header {
  int64_t element_bytes;
  int64_t segment;
  int64_t elements;
  int64_t segments;
  int64_t tail_bytes;   // of the row, after its last whole element
  int64_t first_body;   // where the directory ends
};

int64_t parse(const uint8_t* coded, int64_t coded_bytes, int64_t raw_bytes, Header* header) {
  if (coded_bytes < kHeaderBytes) return kTruncated;
  if (coded[0] != kVersion) return kBadVersion;
  header->element_bytes = coded[1];
  header->segment = load<uint32_t>(coded + 4);
  if (!is_element(header->element_bytes) || load<uint16_t>(coded + 2) != 0) return kBadHeader;
  if (header->segment < 1 || header->segment > kMaxSegment) return kBadHeader;
  if (load<uint64_t>(coded + 8) != static_cast<uint64_t>(raw_bytes)) return kOtherLength;
  header->elements = raw_bytes / header->element_bytes;
  header->segments = num_segments(header->elements, header->segment);
  header->tail_bytes = raw_bytes % header->element_bytes;
  header->first_body = kHeaderBytes + 4 * header->segments * header->element_bytes;
  if (header->first_body > coded_bytes) return kTruncated;
  return 0;
}

// The bodies must fill what lies between the directory and the tail, exactly.
bool directory_adds_up(const uint8_t* coded, int64_t coded_bytes, const Header& header) {
  int64_t bodies = 0;
  for (int64_t i = 0; i < header.segments * header.element_bytes; ++i) {
    bodies += load<uint32_t>(coded + kHeaderBytes + 4 * i) & kBodyMask;
  }
  return header.first_body + bodies + header.tail_bytes == coded_bytes;
}

template <rans::Isa isa>
int64_t encode_row(const uint8_t* raw, int64_t raw_bytes, int64_t element_bytes, int64_t segment, uint8_t* out,
                   int64_t out_bytes) {
  if (!is_element(element_bytes) || segment < 1 || segment > kMaxSegment) return kBadHeader;
  const int64_t elements = raw_bytes / element_bytes;
  const int64_t first_body =
      kHeaderBytes + 4 * num_segments(elements, segment) * element_bytes;
  if (first_body > out_bytes) return kNoRoom;
  const int64_t scratch_bytes = 2 * segment + 2 * rans::kStateBytes;
  const Buffer<uint8_t> memory = allocate<uint8_t>(element_bytes * segment + scratch_bytes);
  if (!memory) return kNoMemory;
  uint8_t* planes[4];
  for (int p = 0; p < element_bytes; ++p) planes[p] = memory.get() + p * segment;
  uint8_t* const scratch = memory.get() + element_bytes * segment;
  out[0] = kVersion;
  out[1] = static_cast<uint8_t>(element_bytes);
  store<uint16_t>(out + 2, 0);
  store(out + 4, static_cast<uint32_t>(segment));
  store(out + 8, static_cast<uint64_t>(raw_bytes));
  uint8_t* directory = out + kHeaderBytes;
  uint8_t* body = out + first_body;
  for (int64_t begin = 0; begin < elements; begin += segment) {
    const int64_t count = elements - begin < segment ? elements - begin : segment;
    split(raw + begin * element_bytes, count, element_bytes, planes);
    for (int p = 0; p < element_bytes; ++p) {
      const int64_t entry =
          encode_plane<isa>(planes[p], count, scratch, scratch_bytes, body, out + out_bytes);
      if (entry < 0) return entry;
      store(directory, static_cast<uint32_t>(entry));
      directory += 4;
      body += entry & kBodyMask;
    }
  }
  const int64_t tail_bytes = raw_bytes % element_bytes;
  if (out + out_bytes - body < tail_bytes) return kNoRoom;
  std::memcpy(body, raw + raw_bytes - tail_bytes, static_cast<size_t>(tail_bytes));
  return body + tail_bytes - out;
}

int64_t decode_row(const uint8_t* coded, int64_t coded_bytes, uint8_t* raw, int64_t raw_bytes, rans::Isa isa) {
  Header header;
  const int64_t refusal = parse(coded, coded_bytes, raw_bytes, &header);
  if (refusal != 0) return refusal;
  if (!directory_adds_up(coded, coded_bytes, header)) return kBadDirectory;
  const Buffer<uint8_t> memory = allocate<uint8_t>(header.element_bytes * header.segment);
  const Buffer<rans::DecodeTable> table = allocate<rans::DecodeTable>(1);
  if (!memory || !table) return kNoMemory;
  const uint8_t* directory = coded + kHeaderBytes;
  const uint8_t* body = coded + header.first_body;
  for (int64_t begin = 0; begin < header.elements; begin += header.segment) {
    const int64_t left = header.elements - begin;
    const int64_t count = left < header.segment ? left : header.segment;
    const uint8_t* planes[4];
    for (int p = 0; p < header.element_bytes; ++p, directory += 4) {
      const auto entry = load<uint32_t>(directory);
      const int64_t bytes = entry & kBodyMask;
      if (!decode_plane(entry >> 30, body, bytes, count, table.get(),
                        memory.get() + p * header.segment, &planes[p], isa)) {
        return kBadBody;
      }
      body += bytes;
    }
    merge(planes, count, header.element_bytes, raw + begin * header.element_bytes);
  }
  std::memcpy(raw + raw_bytes - header.tail_bytes, body, static_cast<size_t>(header.tail_bytes));
  return raw_bytes;
}

rans::Isa chosen(int32_t isa) { return isa == 0 ? rans::best_isa() : static_cast<rans::Isa>(isa); }

}  // namespace

// Raised with every change of the interface below; ops/lossless.py refuses another.
KVX_EXPORT int32_t kvx_lossless_abi() { return 2; }

// The best instruction set of this machine, as rans::Isa.
KVX_EXPORT int32_t kvx_lossless_isa() { return static_cast<int32_t>(rans::best_isa()); }

// Writes the payload of raw[0, raw_bytes) to out[0, out_bytes); returns its length or a Refusal. `isa` is a rans::Isa.
KVX_EXPORT int64_t kvx_lossless_encode(const uint8_t* raw, int64_t raw_bytes, int64_t element_bytes,
                                       int64_t segment, uint8_t* out, int64_t out_bytes, int32_t isa) {
  return machine::on(chosen(isa), [&](auto set) {
    return encode_row<set>(raw, raw_bytes, element_bytes, segment, out, out_bytes);
  });
}

// Fills raw[0, raw_bytes) from a payload; returns raw_bytes or a Refusal. Whatever the payload holds,
// it reads and writes within both.
KVX_EXPORT int64_t kvx_lossless_decode(const uint8_t* coded, int64_t coded_bytes, uint8_t* raw,
                                       int64_t raw_bytes, int32_t isa) {
  return machine::on(chosen(isa), [&](auto set) { return decode_row(coded, coded_bytes, raw, raw_bytes, set); });
}
