#pragma once
#include <cuda_runtime.h>

namespace heddle {

struct FlexArgs;

// What follows the map, of which the sums begin where it has no CTAs: all that they need was there
// before it began
void launch_choice_sm90(const FlexArgs& args, cudaStream_t stream);

}  // namespace heddle
