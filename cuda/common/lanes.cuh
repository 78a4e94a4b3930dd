#pragma once

namespace heddle {

// What lanes of a warp make of their numbers together, each of them the same

// Of the four lanes that share rows of an accumulator
template <class T> __device__ __forceinline__ T quad_sum(T x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
// Of four numbers each lane has the sum of its own, number `lane % 4`
__device__ __forceinline__ float quad_sum_own(const float (&x)[4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
  float pair[2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
    pair[i] =
        (odd ? x[2 * i + 1] : x[2 * i]) + __shfl_xor_sync(~0u, odd ? x[2 * i] : x[2 * i + 1], 1);
  return (high ? pair[1] : pair[0]) + __shfl_xor_sync(~0u, high ? pair[0] : pair[1], 2);
}

// Of all lanes, or of so many side by side
template <class T> __device__ __forceinline__ T warp_sum(T x, int lanes = 32) {
#pragma unroll
  for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

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
