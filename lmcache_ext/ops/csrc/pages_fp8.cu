// Copies KV pages between vLLM's paged tensors on a GPU and rows that hold a byte for each element.
//
// As pages.cu, but that a page is quantised on its way into the row and restored on its way back; pages_fp8.h says what
// lies where, pages_fp8_job.h has the device code. Built without contraction of multiplications and additions: rows are
// those of hosts, bit for bit. As plain C++ it does on the host what it does on a GPU (stage.h).

#include "pages_fp8_job.h"
#include "stage.h"

#define KVX_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int64_t kNoMemory = 2;  // cudaErrorMemoryAllocation

template <kvx::Way way>
int64_t copy(const kvx_page_shape& shape, const kvx_tensor* tensors, int32_t num_tensors, const int64_t* block_ids,
             const int64_t* row_offsets, int64_t num_blocks, uint8_t* rows, int64_t rows_bytes, int32_t num_ctas,
             void* stream) {
  const std::unique_ptr<kvx::fp8::Job> job(new (std::nothrow) kvx::fp8::Job);
  if (!job) return kvx::kLaunchFailed + kNoMemory;
  return kvx::fp8::transfer<way>(shape, tensors, num_tensors, block_ids, row_offsets, num_blocks, rows, rows_bytes,
                                 job.get(), [&](const kvx::fp8::Job& ready, auto stage) {
                                   return kvx::launch_in_turns<decltype(stage)>(ready, num_ctas, stream);
                                 });
}

}  // namespace

// Raised with every change of the interface below; ops/pages_fp8_cuda.py refuses another.
KVX_EXPORT int32_t kvx_cuda_fp8_abi() { return 1; }

// Pages -> rows, enqueued on `stream`: `num_ctas` blocks of 256 threads. Tensors are in the GPU's memory, rows in memory
// it can address; the tables are read before the call returns. Returns bytes of rows, or a refusal.
KVX_EXPORT int64_t kvx_cuda_fp8_gather_pages(const kvx_page_shape* shape, const kvx_tensor* tensors,
                                             int32_t num_tensors, const int64_t* block_ids, const int64_t* row_offsets,
                                             int64_t num_blocks, uint8_t* rows, int64_t rows_bytes, int32_t num_ctas,
                                             void* stream) {
  return copy<kvx::Way::kGather>(*shape, tensors, num_tensors, block_ids, row_offsets, num_blocks, rows, rows_bytes,
                                 num_ctas, stream);
}

// Rows -> pages; `rows` is only read. Returns as kvx_cuda_fp8_gather_pages does.
KVX_EXPORT int64_t kvx_cuda_fp8_scatter_pages(const kvx_page_shape* shape, const kvx_tensor* tensors,
                                              int32_t num_tensors, const int64_t* block_ids,
                                              const int64_t* row_offsets, int64_t num_blocks, uint8_t* rows,
                                              int64_t rows_bytes, int32_t num_ctas, void* stream) {
  return copy<kvx::Way::kScatter>(*shape, tensors, num_tensors, block_ids, row_offsets, num_blocks, rows, rows_bytes,
                                  num_ctas, stream);
}
