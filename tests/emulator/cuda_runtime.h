#pragma once
#include <math.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <map>

#include "emulator.h"

// What CUDA has without a header of ours, done by emulator.h

#define __global__
#define __device__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
// in a function static, and where it is sized by the launch declared without being defined
#define __shared__ thread_local
#define __grid_constant__

using cudaStream_t = void*;
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using std::max;
using std::min;

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct int2 {
  int x, y;
};
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline void __syncthreads() { heddle::emulator::cta->named_sync(0, blockDim.x); }
inline int __syncthreads_count(bool value) {
  static std::map<int, int> counts;  // of CTAs that run together
  int& count = counts[blockIdx.x];
  count += value;
  __syncthreads();
  const int all = count;
  __syncthreads();
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  return all;
}
inline int __syncthreads_or(bool value) { return __syncthreads_count(value) != 0; }
inline void __syncwarp() { heddle::emulator::cta->meet_warp(); }
template <class T> T __shfl_sync(unsigned, T value, int lane) {
  uint32_t words[sizeof(T) / 4];
  std::memcpy(words, &value, sizeof(T));
  for (uint32_t& word : words) word = heddle::emulator::cta->exchange(word, lane);
  std::memcpy(&value, words, sizeof(T));
  return value;
}
template <class T> T __shfl_up_sync(unsigned lanes, T value, int step) {
  const int lane = threadIdx.x % 32;
  return __shfl_sync(lanes, value, lane < step ? lane : lane - step);
}
template <class T> T __shfl_xor_sync(unsigned lanes, T value, int mask) {
  return __shfl_sync(lanes, value, (threadIdx.x % 32) ^ mask);
}

inline unsigned __ballot_sync(unsigned, bool value) {
  unsigned lanes = 0;
  const auto values = heddle::emulator::cta->exchange(value);
  for (size_t lane = 0; lane < 32; ++lane) lanes |= values[lane] << lane;
  return lanes;
}
inline int __any_sync(unsigned lanes, bool value) { return __ballot_sync(lanes, value) != 0; }
inline int __all_sync(unsigned lanes, bool value) { return __ballot_sync(lanes, value) == ~0u; }
inline unsigned __reduce_add_sync(unsigned, unsigned value) {
  unsigned sum = 0;
  for (const uint32_t other : heddle::emulator::cta->exchange(value)) sum += other;
  return sum;
}
inline unsigned __reduce_or_sync(unsigned, unsigned value) {
  unsigned all = 0;
  for (const uint32_t other : heddle::emulator::cta->exchange(value)) all |= other;
  return all;
}
inline unsigned __reduce_xor_sync(unsigned, unsigned value) {
  unsigned sum = 0;
  for (const uint32_t other : heddle::emulator::cta->exchange(value)) sum ^= other;
  return sum;
}

inline int __clz(int value) { return std::countl_zero(static_cast<uint32_t>(value)); }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
inline int __ffs(int value) {
  return value ? std::countr_zero(static_cast<uint32_t>(value)) + 1 : 0;
}
inline int __popc(unsigned value) { return std::popcount(value); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline int __vimax3_s32(int a, int b, int c) { return std::max({a, b, c}); }

template <class T> T __ldg(const T* from) { return *from; }
template <class T> T __ldcs(const T* from) { return *from; }
template <class T> void __stcs(T* to, T x) { *to = x; }
template <class T, class Y> T atomicAdd(T* x, Y y) {
  const T before = *x;
  *x += static_cast<T>(y);
  return before;
}
template <class T> T atomicCAS(T* x, T from, T to) {
  const T before = *x;
  if (before == from) *x = to;
  return before;
}
template <class T> T atomicOr(T* x, T y) {
  const T before = *x;
  *x |= y;
  return before;
}
template <class T> T atomicMax(T* x, T y) {
  const T before = *x;
  *x = std::max(before, y);
  return before;
}
inline void __threadfence() {}
inline void __nanosleep(unsigned) { heddle::emulator::cta->pause(); }
