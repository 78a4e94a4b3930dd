#pragma once
#include <cuda_runtime.h>

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

}  // namespace heddle
