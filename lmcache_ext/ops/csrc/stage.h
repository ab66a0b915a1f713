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

template <typename Stage, typename Job>
__global__ void __launch_bounds__(Stage::kWarps * warp::kLanes) run_in_turns(const __grid_constant__ Job job) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * Stage::kWarps;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * Stage::kWarps + threadIdx.x / warp::kLanes;
  const int64_t items = Stage::items(job);
  for (int64_t item = first; item < items; item += warps) Stage::run(job, item, nullptr);
}

// The same on no more than `most` blocks of threads, whose warps take one item after the other: what is computed
// meanwhile hardly notices. For a stage without Shared.
template <typename Stage, typename Job>
int64_t launch_in_turns(const Job& job, int32_t most, void* stream) {
  const int64_t wanted = (Stage::items(job) + Stage::kWarps - 1) / Stage::kWarps;
  const auto blocks = static_cast<unsigned>(wanted < most ? wanted : most);
  if (blocks == 0) return cudaSuccess;
  run_in_turns<Stage><<<blocks, Stage::kWarps * warp::kLanes, 0, static_cast<cudaStream_t>(stream)>>>(job);
  return cudaGetLastError();
}

#else

template <typename Stage, typename Job>
int64_t launch(const Job& job, void*) {
  const std::unique_ptr<typename Stage::Shared> shared(new typename Stage::Shared);
  for (int64_t item = 0; item < Stage::items(job); ++item) Stage::run(job, item, shared.get());
  return 0;
}

template <typename Stage, typename Job>
int64_t launch_in_turns(const Job& job, int32_t, void*) {
  for (int64_t item = 0; item < Stage::items(job); ++item) Stage::run(job, item, nullptr);
  return 0;
}

#endif

}  // namespace kvx
