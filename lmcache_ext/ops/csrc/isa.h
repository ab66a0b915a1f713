// Which instruction sets this machine has, and code compiled for them: a library is built for the least of them.

#pragma once

#include <cstdint>
#include <type_traits>

namespace machine {

enum class Isa : int32_t { kBest = 0, kScalar = 1, kAvx2 = 2, kAvx512 = 3 };

inline Isa best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2")) return Isa::kAvx2;
#endif
  return Isa::kScalar;
}

// Runs work(chosen) compiled for an instruction set: the loops in it become vectors of its width. `chosen` is a constant.
#if defined(__x86_64__)

template <typename Work>
__attribute__((flatten, target("avx512f,avx512bw,avx512vl,avx512dq,popcnt"))) auto on_avx512(const Work& work) {
  return work(std::integral_constant<Isa, Isa::kAvx512>());
}

template <typename Work>
__attribute__((flatten, target("avx2,popcnt"))) auto on_avx2(const Work& work) {
  return work(std::integral_constant<Isa, Isa::kAvx2>());
}

#endif  // __x86_64__

template <typename Work>
auto on(Isa isa, const Work& work) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return on_avx512(work);
  if (isa == Isa::kAvx2) return on_avx2(work);
#endif
  return work(std::integral_constant<Isa, Isa::kScalar>());
}

}  // namespace machine
