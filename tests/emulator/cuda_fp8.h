#pragma once
#include "common/elements.cuh"

// Float8 as CUDA converts it

using __nv_fp8_storage_t = uint8_t;
enum { __NV_E4M3 };
inline heddle::F16 __nv_cvt_fp8_to_halfraw(__nv_fp8_storage_t bits, int) {
  using namespace heddle;
  return from_float<F16>(emulator::decode(DType::kE4M3, bits));
}
inline float __half2float(heddle::F16 x) { return heddle::to_float(x); }
