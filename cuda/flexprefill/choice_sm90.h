#pragma once
#include <cuda_runtime.h>

namespace heddle {

struct FlexArgs;
struct DecideArgs;

// Before the map, which counts what only the choice clears: nothing may fail in between
void prepare_choice_sm90();
// Behind the first of two walks; how many steps a warp has is found here
void launch_decide_sm90(DecideArgs args, int processors, cudaStream_t stream);
// What follows the map: sums, which begin where it has no CTAs, as all that they need was there
// before it began, or, where it has been decided which way heads go, counts behind it
void launch_choice_sm90(const FlexArgs& args, int processors, cudaStream_t stream);

}  // namespace heddle
