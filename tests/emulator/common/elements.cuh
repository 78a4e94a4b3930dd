#pragma once
#include <cuda_runtime.h>

#include <algorithm>

#include "common/context.h"
#include "core/tensor.h"

// The emulator's side of cuda/common/elements.cuh
namespace heddle {

template <DType kType> struct Element { uint16_t bits; };
using F16 = Element<DType::kF16>;
using BF16 = Element<DType::kBF16>;

inline float to_float(float x) { return x; }
template <DType kType> float to_float(Element<kType> x) { return emulator::decode(kType, x.bits); }

template <class T> T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline F16 from_float<F16>(float x) { return {emulator::encode(DType::kF16, x)}; }
template <> inline BF16 from_float<BF16>(float x) { return {emulator::encode(DType::kBF16, x)}; }

// Calls body(T{}) with the type that a float dtype is stored as
template <class Body> void dispatch_float(DType dtype, const Body& body) {
  dtype == DType::kF32 ? body(float{}) : dtype == DType::kF16 ? body(F16{}) : body(BF16{});
}
inline float load_float(const void* from, int64_t at, DType dtype) {
  float x = 0;
  dispatch_float(dtype, [&]<class T>(T) { x = to_float(static_cast<const T*>(from)[at]); });
  return x;
}
inline void store_float(void* to, int64_t at, DType dtype, float x) {
  dispatch_float(dtype, [&]<class T>(T) { static_cast<T*>(to)[at] = from_float<T>(x); });
}

// A tensor as a kernel takes it
struct Strided {
  char* data;
  int64_t shape[kMaxRank], strides[kMaxRank];
  explicit Strided(const Tensor& tensor) : data(tensor.as<char>()) {
    std::copy_n(tensor.shape, kMaxRank, shape);
    std::copy_n(tensor.strides, kMaxRank, strides);
  }
};

constexpr int kThreads = 256;
inline unsigned blocks_for(int64_t, const CudaContext& context) {
  return static_cast<unsigned>(context.processors);
}
inline float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }

}  // namespace heddle
