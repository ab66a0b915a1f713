// The device code of the CUDA page copier on the host: every lane of every warp, one after the other.

#include "../../lmcache_ext/ops/csrc/pages_transfer.h"

#include <memory>

namespace {

template <kvx::Way way>
int64_t run(const kvx_tensor* tensors, int32_t num_tensors, const int64_t* block_ids, const int64_t* row_offsets,
            int64_t num_blocks, uint8_t* rows, int64_t rows_bytes) {
  const auto transfer = std::make_unique<kvx::Transfer>();
  return kvx::transfer_pages(tensors, num_tensors, block_ids, row_offsets, num_blocks, rows, rows_bytes,
                             transfer.get(), [](const kvx::Transfer& ready) -> int64_t {
                               for (int64_t piece = 0; piece < kvx::num_pieces(ready); ++piece) {
                                 for (int lane = 0; lane < kvx::kWarp; ++lane) kvx::copy_piece<way>(ready, piece, lane);
                               }
                               return 0;
                             });
}

}  // namespace

extern "C" int64_t gather(const kvx_tensor* tensors, int32_t num_tensors, const int64_t* block_ids,
                          const int64_t* row_offsets, int64_t num_blocks, uint8_t* rows, int64_t rows_bytes) {
  return run<kvx::Way::kGather>(tensors, num_tensors, block_ids, row_offsets, num_blocks, rows, rows_bytes);
}

extern "C" int64_t scatter(const kvx_tensor* tensors, int32_t num_tensors, const int64_t* block_ids,
                           const int64_t* row_offsets, int64_t num_blocks, uint8_t* rows, int64_t rows_bytes) {
  return run<kvx::Way::kScatter>(tensors, num_tensors, block_ids, row_offsets, num_blocks, rows, rows_bytes);
}
