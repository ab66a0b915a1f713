// The CUDA page copier on the host: every lane of every warp, one after the other, behind the interface of pages.cu.

#include "../../lmcache_ext/ops/csrc/pages_transfer.h"

#include <memory>

namespace {

using Enqueue = void (*)(void* stream, void* work);

struct Work {
  kvx::Way way;
  kvx::Transfer transfer;
};

Enqueue enqueue = nullptr;

template <kvx::Way way>
void run_lanes(const kvx::Transfer& transfer) {
  for (int64_t piece = 0; piece < kvx::num_pieces(transfer); ++piece) {
    for (int lane = 0; lane < kvx::kWarp; ++lane) kvx::copy_piece<way>(transfer, piece, lane);
  }
}

template <kvx::Way way>
int64_t copy(const kvx_tensor* tensors, int32_t num_tensors, const int64_t* block_ids, const int64_t* row_offsets,
             int64_t num_blocks, uint8_t* rows, int64_t rows_bytes, void* stream) {
  const auto transfer = std::make_unique<kvx::Transfer>();
  return kvx::transfer_pages(tensors, num_tensors, block_ids, row_offsets, num_blocks, rows, rows_bytes,
                             transfer.get(), [&](const kvx::Transfer& ready) -> int64_t {
                               if (enqueue) {
                                 enqueue(stream, new Work{way, ready});
                               } else {
                                 run_lanes<way>(ready);
                               }
                               return 0;
                             });
}

}  // namespace

// From here on a launch hands its parameters to `hook` instead of running; null: it runs at once.
extern "C" void set_enqueue(Enqueue hook) { enqueue = hook; }

// What was handed to the hook, run and freed.
extern "C" void run_work(void* handed) {
  const std::unique_ptr<Work> work(static_cast<Work*>(handed));
  if (work->way == kvx::Way::kGather) {
    run_lanes<kvx::Way::kGather>(work->transfer);
  } else {
    run_lanes<kvx::Way::kScatter>(work->transfer);
  }
}

extern "C" int64_t kvx_cuda_gather_pages(const kvx_tensor* tensors, int32_t num_tensors, const int64_t* block_ids,
                                         const int64_t* row_offsets, int64_t num_blocks, uint8_t* rows,
                                         int64_t rows_bytes, int32_t, void* stream) {
  return copy<kvx::Way::kGather>(tensors, num_tensors, block_ids, row_offsets, num_blocks, rows, rows_bytes, stream);
}

extern "C" int64_t kvx_cuda_scatter_pages(const kvx_tensor* tensors, int32_t num_tensors, const int64_t* block_ids,
                                          const int64_t* row_offsets, int64_t num_blocks, uint8_t* rows,
                                          int64_t rows_bytes, int32_t, void* stream) {
  return copy<kvx::Way::kScatter>(tensors, num_tensors, block_ids, row_offsets, num_blocks, rows, rows_bytes, stream);
}
