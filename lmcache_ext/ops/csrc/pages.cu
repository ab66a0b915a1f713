// Copies KV pages between vLLM's paged tensors on a GPU and rows of pinned host memory (or of the GPU's own).
//
// One launch for each direction and step, whatever the number of requests, layers and blocks; few blocks of threads, so
// that what is computed meanwhile hardly notices; no synchronisation, no copy ahead of the launch. The interface is C
// with pointers and a stream, for any version of torch or none. `pages_transfer.h` has the device code.

#include <cuda_runtime.h>

#include <memory>
#include <new>

#include "pages_transfer.h"

#define KVX_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kThreads = 256;

template <kvx::Way way>
__global__ void __launch_bounds__(kThreads) copy_pages(const __grid_constant__ kvx::Transfer transfer) {
  const int lane = threadIdx.x % kvx::kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kvx::kWarp);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads / kvx::kWarp) + threadIdx.x / kvx::kWarp;
  const int64_t pieces = kvx::num_pieces(transfer);
  for (int64_t piece = first; piece < pieces; piece += warps) kvx::copy_piece<way>(transfer, piece, lane);
}

template <kvx::Way way>
int64_t copy(const kvx_tensor* tensors, int32_t num_tensors, const int64_t* block_ids, const int64_t* row_offsets,
             int64_t num_blocks, uint8_t* rows, int64_t rows_bytes, int32_t num_ctas, cudaStream_t stream) {
  const std::unique_ptr<kvx::Transfer> transfer(new (std::nothrow) kvx::Transfer);
  if (!transfer) return kvx::kLaunchFailed + cudaErrorMemoryAllocation;
  return kvx::transfer_pages(tensors, num_tensors, block_ids, row_offsets, num_blocks, rows, rows_bytes, transfer.get(),
                             [&](const kvx::Transfer& ready) -> int64_t {
                               const int64_t warps = kThreads / kvx::kWarp;
                               const int64_t most = (kvx::num_pieces(ready) + warps - 1) / warps;
                               const auto ctas = static_cast<unsigned>(num_ctas < most ? num_ctas : most);
                               copy_pages<way><<<ctas, kThreads, 0, stream>>>(ready);
                               return cudaGetLastError();
                             });
}

}  // namespace

// Raised with every change of the interface below; ops/pages_cuda.py refuses another.
KVX_EXPORT int32_t kvx_cuda_abi() { return 1; }

// Pages -> rows, enqueued on `stream`: `num_ctas` blocks of 256 threads. Tensors are in the GPU's memory, rows in memory
// it can address; the tables are read before the call returns. Returns bytes, or a refusal of pages_transfer.h.
KVX_EXPORT int64_t kvx_cuda_gather_pages(const kvx_tensor* tensors, int32_t num_tensors, const int64_t* block_ids,
                                         const int64_t* row_offsets, int64_t num_blocks, uint8_t* rows,
                                         int64_t rows_bytes, int32_t num_ctas, void* stream) {
  return copy<kvx::Way::kGather>(tensors, num_tensors, block_ids, row_offsets, num_blocks, rows, rows_bytes, num_ctas,
                                 static_cast<cudaStream_t>(stream));
}

// Rows -> pages; `rows` is only read. Returns as kvx_cuda_gather_pages does.
KVX_EXPORT int64_t kvx_cuda_scatter_pages(const kvx_tensor* tensors, int32_t num_tensors, const int64_t* block_ids,
                                          const int64_t* row_offsets, int64_t num_blocks, uint8_t* rows,
                                          int64_t rows_bytes, int32_t num_ctas, void* stream) {
  return copy<kvx::Way::kScatter>(tensors, num_tensors, block_ids, row_offsets, num_blocks, rows, rows_bytes, num_ctas,
                                  static_cast<cudaStream_t>(stream));
}

// The baseline of benchmarks/gpu: the driver's batch of copies, as vLLM's own copier uses it. 0 or a CUDA error.
KVX_EXPORT int32_t kvx_cuda_copy_batch(void** to, void** from, size_t* bytes, size_t count, void* stream) {
#if CUDART_VERSION >= 12080
  cudaMemcpyAttributes attributes = {};
  attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
  size_t first = 0;
#if CUDART_VERSION >= 13000
  return cudaMemcpyBatchAsync(const_cast<const void**>(to), const_cast<const void**>(from), bytes, count, &attributes,
                              &first, 1, static_cast<cudaStream_t>(stream));
#else
  size_t failed = 0;
  return cudaMemcpyBatchAsync(to, from, bytes, count, &attributes, &first, 1, &failed,
                              static_cast<cudaStream_t>(stream));
#endif
#else
  for (size_t i = 0; i < count; ++i) {
    const cudaError_t error =
        cudaMemcpyAsync(to[i], from[i], bytes[i], cudaMemcpyDefault, static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
#endif
}
