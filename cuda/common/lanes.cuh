#pragma once

namespace heddle {

// The sum of what this lane of a warp has and those before it
template <class T> __device__ __forceinline__ T sum_so_far(T x, int lane) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const T before = __shfl_up_sync(~0u, x, step);
    if (lane >= step) x += before;
  }
  return x;
}

}  // namespace heddle
