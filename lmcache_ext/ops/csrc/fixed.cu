// The fixed-rate codecs on a GPU: payloads that hosts read, and those that hosts have written.
//
// Everything is enqueued on a stream, nothing waits; nothing is allocated. The interface is C with pointers and a stream,
// for any version of torch or none. `fixed_job.h` has the device code. Built without contraction of multiplications and
// additions: payloads are compared bit for bit. As plain C++ it does on the host what it does on a GPU (stage.h).

#include "fixed_job.h"
#include "stage.h"

#define KVX_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

int64_t enqueue_fixed(const kvx::Call& call, int32_t scheme, bool encodes, void* stream) {
  return kvx::fixed::code(call, scheme, encodes, [&](const kvx::fixed::Job& job, auto stage) {
    return kvx::launch<decltype(stage)>(job, stream);
  });
}

}  // namespace

// Raised with every change of the interface below; ops/fixed_cuda.py refuses another.
KVX_EXPORT int32_t kvx_cuda_fixed_abi() { return 1; }

// Bytes of the image that the calls below read.
KVX_EXPORT int64_t kvx_cuda_fixed_tables_bytes(const kvx_layout* layout) {
  int64_t bytes = 0;
  kvx::places_at(*layout, nullptr, &bytes);
  return bytes;
}

// Fills the image in the host's memory, which the caller then brings to the GPU's; 0 or a refusal.
KVX_EXPORT int64_t kvx_cuda_fixed_tables(const kvx_layout* layout, uint8_t* out) {
  int64_t at = 0;
  return kvx::fill_places(*layout, kvx::places_at(*layout, out, &at));
}

// Enqueues the coding of `count` rows to payloads. `chunks` is on the host and read before the call returns; results[i]
// becomes the length of payload i, or kOtherLength where its room is not of that length. Returns 0 or a refusal.
KVX_EXPORT int64_t kvx_cuda_fixed_encode(const kvx_layout* layout, int32_t scheme, uint8_t* tables,
                                         const kvx::Chunk* chunks, int64_t count, int64_t* results, void* stream) {
  return enqueue_fixed({layout, tables, chunks, count, results, nullptr, 0}, scheme, true, stream);
}

// Enqueues the coding of `count` payloads to rows; results[i] becomes 0, or why payload i was refused, whose row then is
// as it was.
KVX_EXPORT int64_t kvx_cuda_fixed_decode(const kvx_layout* layout, int32_t scheme, uint8_t* tables,
                                         const kvx::Chunk* chunks, int64_t count, int64_t* results, void* stream) {
  return enqueue_fixed({layout, tables, chunks, count, results, nullptr, 0}, scheme, false, stream);
}
