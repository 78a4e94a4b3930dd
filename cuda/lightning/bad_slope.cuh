#pragma once
#include <cuda_runtime.h>

#include <cfloat>

namespace heddle {

// Negative, infinite or no number
__device__ __forceinline__ bool bad_slope(float slope) { return !(slope >= 0 && slope <= FLT_MAX); }

}  // namespace heddle
