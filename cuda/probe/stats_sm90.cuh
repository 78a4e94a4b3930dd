#pragma once
#include "common/sm90.cuh"

namespace heddle {

// The logarithm, base 2, of all that a query weighs, of its largest scores and sums in `parts` sets
// of keys, 128 queries each
__device__ __forceinline__ float lse_of_parts(const float2* stats, int parts) {
  constexpr int kAhead = 8;  // that are waited for at once
  const auto at = [&](int i) { return stats[min(i, parts - 1) * 128]; };
  float top = -3e38f, sum = 0;
  for (int i = 0; i < parts; i += kAhead)
#pragma unroll
    for (int j = 0; j < kAhead; ++j) top = fmaxf(top, at(i + j).x);
  for (int i = 0; i < parts; i += kAhead)
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const float2 own = at(i + j);
      sum += i + j < parts ? own.y * sm90::exp2_approx(own.x - top) : 0;
    }
  return top + log2f(sum);
}

}  // namespace heddle
