#pragma once
#include <cuda_runtime.h>

namespace heddle {

struct FlexArgs;

// Before the map, which counts what only the choice clears: nothing may fail in between
void prepare_choice_sm90();
// What follows the map, of which the sums begin where it has no CTAs: all that they need was there
// before it began
void launch_choice_sm90(const FlexArgs& args, cudaStream_t stream);

}  // namespace heddle
