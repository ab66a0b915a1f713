// A warp in one source for GPUs and hosts, so that what the tests run on a host is what a GPU runs.
//
// What each lane does is inside `each`, what all do alike is outside, and lanes tell each other something only by
// `ballot`, `shuffle` and `sum_before`, or by memory with a `meet` in between. On a GPU a thread is one lane of its warp
// and `Lanes` one register; on a host the lanes of an `each` run one after the other and `Lanes` is an array.

#pragma once

#include <cstdint>

#include "device.h"

#if defined(__CUDA_ARCH__)
#define KVX_UNROLL _Pragma("unroll")
#else
#define KVX_UNROLL
#endif

namespace kvx {
namespace warp {

constexpr int kLanes = 32;

#if defined(__CUDA_ARCH__)
constexpr int kHeld = 1;
#else
constexpr int kHeld = kLanes;
#endif

// A value of each lane.
template <typename T>
class Lanes {
 public:
  KVX_DEVICE T& operator[](int lane) { return value_[lane % kHeld]; }
  KVX_DEVICE const T& operator[](int lane) const { return value_[lane % kHeld]; }

 private:
  T value_[kHeld];
};

template <typename Work>
KVX_DEVICE void each(const Work& work) {
#if defined(__CUDA_ARCH__)
  work(static_cast<int>(threadIdx.x % kLanes));
#else
  for (int lane = 0; lane < kLanes; ++lane) work(lane);
#endif
}

// What lanes have written before it, all of them see behind it.
KVX_DEVICE void meet() {
#if defined(__CUDA_ARCH__)
  __syncwarp();
#endif
}

KVX_DEVICE int count(uint32_t mask) {
#if defined(__CUDA_ARCH__)
  return __popc(mask);
#else
  return __builtin_popcount(mask);
#endif
}

// How many lanes before this one are in the mask.
KVX_DEVICE int rank(uint32_t mask, int lane) { return count(mask & ((1u << lane) - 1)); }

// The mask of lanes that say yes.
KVX_DEVICE uint32_t ballot(const Lanes<bool>& says) {
#if defined(__CUDA_ARCH__)
  return __ballot_sync(0xffffffffu, says[0]);
#else
  uint32_t mask = 0;
  for (int lane = 0; lane < kLanes; ++lane) mask |= static_cast<uint32_t>(says[lane]) << lane;
  return mask;
#endif
}

// The value that the first lane has, for all: what memory that others write says must not divide a warp.
KVX_DEVICE int64_t of_first(int64_t value) {
#if defined(__CUDA_ARCH__)
  return __shfl_sync(0xffffffffu, value, 0);
#else
  return value;
#endif
}

// For each lane the value of lane `from % 32`.
KVX_DEVICE Lanes<uint32_t> shuffle(const Lanes<uint32_t>& values, const Lanes<int>& from) {
  Lanes<uint32_t> got;
#if defined(__CUDA_ARCH__)
  got[0] = __shfl_sync(0xffffffffu, values[0], from[0]);
#else
  for (int lane = 0; lane < kLanes; ++lane) got[lane] = values[from[lane] % kLanes];
#endif
  return got;
}

// The largest of the lanes' values.
KVX_DEVICE uint32_t most(const Lanes<uint32_t>& values) {
#if defined(__CUDA_ARCH__)
  return __reduce_max_sync(0xffffffffu, values[0]);
#else
  uint32_t largest = 0;
  for (int lane = 0; lane < kLanes; ++lane) largest = values[lane] > largest ? values[lane] : largest;
  return largest;
#endif
}

// For each lane the sum of the values of those before it; `total` is that of all.
KVX_DEVICE Lanes<int64_t> sum_before(const Lanes<int64_t>& values, int64_t* total) {
  Lanes<int64_t> before;
#if defined(__CUDA_ARCH__)
  int64_t sum = values[0];
  for (int way = 1; way < kLanes; way *= 2) {
    const int64_t other = __shfl_up_sync(0xffffffffu, sum, way);
    if (static_cast<int>(threadIdx.x % kLanes) >= way) sum += other;
  }
  before[0] = sum - values[0];
  *total = __shfl_sync(0xffffffffu, sum, kLanes - 1);
#else
  *total = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    before[lane] = *total;
    *total += values[lane];
  }
#endif
  return before;
}

}  // namespace warp
}  // namespace kvx
