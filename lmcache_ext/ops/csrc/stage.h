// Launches a stage of a job: on a GPU a warp for each item, on a host item after item, lane after lane.
//
// A stage is a class of items(job), the number of warps; run(job, item, shared), what one does; Shared, its memory that
// is quick; kWarps, how many make a block of threads. The same .cu compiled as plain C++ is what the tests run.

#pragma once

#include <memory>
#include <new>

#include "warp.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace kvx {

#if defined(__CUDACC__)

template <typename Stage, typename Job>
__global__ void __launch_bounds__(Stage::kWarps * warp::kLanes) run_stage(const __grid_constant__ Job job) {
  __shared__ typename Stage::Shared shared[Stage::kWarps];
  const int warp = static_cast<int>(threadIdx.x) / warp::kLanes;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * Stage::kWarps + warp;
  if (item < Stage::items(job)) Stage::run(job, item, &shared[warp]);
}

// Enqueues on the stream; 0 or the driver's error code.
template <typename Stage, typename Job>
int64_t launch(const Job& job, void* stream) {
  const int64_t blocks = (Stage::items(job) + Stage::kWarps - 1) / Stage::kWarps;
  if (blocks == 0) return cudaSuccess;
  run_stage<Stage><<<static_cast<unsigned>(blocks), Stage::kWarps * warp::kLanes, 0,
                     static_cast<cudaStream_t>(stream)>>>(job);
  return cudaGetLastError();
}

#else

template <typename Stage, typename Job>
int64_t launch(const Job& job, void*) {
  const std::unique_ptr<typename Stage::Shared> shared(new typename Stage::Shared);
  for (int64_t item = 0; item < Stage::items(job); ++item) Stage::run(job, item, shared.get());
  return 0;
}

#endif

}  // namespace kvx
