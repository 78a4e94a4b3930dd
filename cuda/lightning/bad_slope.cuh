#pragma once
#include <cuda_runtime.h>

#include <cfloat>

namespace heddle {

// Negative, infinite or no number
__device__ __forceinline__ bool bad_slope(float slope) { return !(slope >= 0 && slope <= FLT_MAX); }

// Finite, so that nothing decays over no distance
__device__ __forceinline__ float in_log2(float slope) {
  return fminf(slope * 1.44269504f, FLT_MAX);
}

}  // namespace heddle
