#pragma once
#include "common/elements.cuh"
#include "probe/means.h"

namespace heddle {

// Element `at` of the means
__device__ __forceinline__ void store_mean(const MeanArgs& args, int64_t at, float mean) {
  if (!args.planes) {
    args.mean[at] = mean;
    return;
  }
  auto* planes = reinterpret_cast<BF16*>(args.planes) + at;
#pragma unroll
  for (int plane = 0; plane < kMeanPlanes; ++plane) {
    const auto part = from_float<BF16>(mean);
    planes[plane * args.apart] = part;
    mean -= to_float(part);
  }
}

}  // namespace heddle
