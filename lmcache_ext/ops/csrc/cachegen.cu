// The cachegen codec on a GPU: payloads that hosts read, and those that hosts have written.
//
// Everything is enqueued on a stream, nothing waits; nothing is allocated. The interface is C with pointers and a stream,
// for any version of torch or none. `cachegen_encode.h` and `cachegen_decode.h` have the device code. Built without
// contraction of multiplications and additions: payloads are compared bit for bit. As plain C++ it does on the host what
// it does on a GPU (stage.h).

#include "cachegen_launch.h"
#include "stage.h"

#define KVX_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace kvx;
using namespace kvx::cachegen;

int64_t enqueue(const Call& call, bool encodes, void* stream) {
  return code(call, encodes, [&](const Job& job, auto stage) { return kvx::launch<decltype(stage)>(job, stream); });
}

}  // namespace

// Raised with every change of the interface below; ops/cachegen_cuda.py refuses another.
KVX_EXPORT int32_t kvx_cuda_cachegen_abi() { return 1; }

// Bytes of the image that the calls below read, and of the scratch that they need for each chunk at a time.
KVX_EXPORT int64_t kvx_cuda_cachegen_tables_bytes(const kvx_layout* layout) {
  return tables_at(*layout, nullptr).bytes;
}

KVX_EXPORT int64_t kvx_cuda_cachegen_scratch_bytes(const kvx_layout* layout, int32_t encodes) {
  return scratch_at(*layout, encodes != 0, nullptr).bytes;
}

// Fills the image in the host's memory, which the caller then brings to the GPU's; 0 or a refusal. `bins` holds two
// numbers for each layer; who only decodes may give any.
KVX_EXPORT int64_t kvx_cuda_cachegen_tables(const kvx_layout* layout, const float* bins, uint8_t* out) {
  return fill_tables(*layout, bins, out);
}

// Enqueues the coding of `count` rows to payloads. `chunks` is on the host and read before the call returns; results[i]
// becomes the length of payload i, or kNoRoom where it would exceed its room. Returns 0 or a refusal.
KVX_EXPORT int64_t kvx_cuda_cachegen_encode(const kvx_layout* layout, uint8_t* tables, const Chunk* chunks,
                                            int64_t count, int64_t* results, uint8_t* scratch, int64_t scratch_bytes,
                                            void* stream) {
  const Call call = {layout, tables, chunks, count, results, scratch, scratch_bytes};
  return enqueue(call, true, stream);
}

// Enqueues the coding of `count` payloads to rows; results[i] becomes 0, or why payload i was refused, whose row then is
// as it was.
KVX_EXPORT int64_t kvx_cuda_cachegen_decode(const kvx_layout* layout, uint8_t* tables, const Chunk* chunks,
                                            int64_t count, int64_t* results, uint8_t* scratch, int64_t scratch_bytes,
                                            void* stream) {
  const Call call = {layout, tables, chunks, count, results, scratch, scratch_bytes};
  return enqueue(call, false, stream);
}
