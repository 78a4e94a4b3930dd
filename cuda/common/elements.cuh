#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>

#include "common/context.h"
#include "core/tensor.h"

// Elements of any dtype as f32 or f64, and where the elements of strided tensors stand.
namespace heddle {

using F16 = __half;
using BF16 = __nv_bfloat16;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(F16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(BF16 x) { return __bfloat162float(x); }

template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ F16 from_float<F16>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ BF16 from_float<BF16>(float x) {
  return __float2bfloat16_rn(x);
}

// An element of a float dtype that is known when it runs
__device__ __forceinline__ float load_float(const void* from, int64_t at, DType dtype) {
  if (dtype == DType::kF32) return static_cast<const float*>(from)[at];
  if (dtype == DType::kF16) return to_float(static_cast<const F16*>(from)[at]);
  return to_float(static_cast<const BF16*>(from)[at]);
}
__device__ __forceinline__ void store_float(void* to, int64_t at, DType dtype, float x) {
  if (dtype == DType::kF32) {
    static_cast<float*>(to)[at] = x;
  } else if (dtype == DType::kF16) {
    static_cast<F16*>(to)[at] = from_float<F16>(x);
  } else {
    static_cast<BF16*>(to)[at] = from_float<BF16>(x);
  }
}

// Calls body(T{}) with the type that a float dtype is stored as
template <class Body> constexpr void dispatch_float(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kF32:
      return body(float{});
    case DType::kF16:
      return body(F16{});
    default:
      return body(BF16{});
  }
}

// A tensor as a kernel takes it
struct Strided {
  char* data;
  int64_t shape[kMaxRank], strides[kMaxRank];
  int rank;
  bool contiguous;

  explicit Strided(const Tensor& tensor)
      : data(tensor.as<char>()), rank(std::max(tensor.rank, 0)), contiguous(tensor.contiguous()) {
    std::copy_n(tensor.shape, kMaxRank, shape);
    std::copy_n(tensor.strides, kMaxRank, strides);
  }

  // Where the element of a row-major index stands
  __device__ __forceinline__ int64_t offset(int64_t index) const {
    if (contiguous) return index;
    int64_t offset = 0;
    for (int i = rank - 1; i >= 0; --i) {
      offset += index % shape[i] * strides[i];
      index /= shape[i];
    }
    return offset;
  }
  template <class T> __device__ __forceinline__ T& at(int64_t index) const {
    return reinterpret_cast<T*>(data)[offset(index)];
  }
};

// 16 bytes of elements, as one load or store moves them
template <class T> struct alignas(16) Wide {
  static constexpr int kCount = 16 / sizeof(T);
  T values[kCount];

  // Whether rows of d elements that begin `stride` after another can be moved like this
  static bool fits(const void* data, int64_t d, int64_t stride) {
    return d % kCount == 0 && stride % kCount == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  }
};

constexpr int kThreads = 256;

// CTAs of kThreads for a loop over `count` elements
inline unsigned blocks_for(int64_t count, const CudaContext& context) {
  return static_cast<unsigned>(
      std::clamp<int64_t>((count + kThreads - 1) / kThreads, 1, context.processors * 16));
}

#define HEDDLE_EACH(index, count)                                                   \
  for (int64_t index = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; \
       index < (count); index += static_cast<int64_t>(gridDim.x) * blockDim.x)

__device__ __forceinline__ float sigmoid(float x) { return 1 / (1 + expf(-x)); }

}  // namespace heddle
