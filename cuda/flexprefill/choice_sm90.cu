#include "flexprefill/choice_sm90.h"

#include "common/launch.h"
#include "common/sm90.cuh"
#include "flexprefill/choice.cuh"

namespace heddle {
namespace {

constexpr int kSumThreads = 256;

__global__ void __launch_bounds__(kSumThreads)
    flexprefill_sums_sm90_kernel(const __grid_constant__ FlexArgs args) {
  sm90::let_next_begin();
  flexprefill_sum(args, (blockIdx.x * int64_t{kSumThreads} + threadIdx.x) / 32);
  if (blockIdx.x == 0) sm90::await_previous();
}

__global__ void __launch_bounds__(kChoiceThreads)
    flexprefill_sm90_kernel(const __grid_constant__ FlexArgs args) {
  __shared__ FlexShared memory;
  sm90::await_previous();
  flexprefill_choose(args, static_cast<int>(blockIdx.x), memory);
}

}  // namespace

void prepare_choice_sm90() {
  static uint64_t sums = 0, choice = 0;
  allow_shared_memory(reinterpret_cast<const void*>(flexprefill_sums_sm90_kernel), 0, sums);
  allow_shared_memory(reinterpret_cast<const void*>(flexprefill_sm90_kernel), 0, choice);
}

void launch_choice_sm90(const FlexArgs& args, cudaStream_t stream) {
  const int64_t warps = args.task.heads * 2 * args.task.nk, each = kSumThreads / 32;
  Launch sums{static_cast<int>((warps + each - 1) / each), kSumThreads, 0, stream};
  sums.overlaps = true;
  launch<flexprefill_sums_sm90_kernel>(sums, args);
  Launch choice{args.group_count * args.members, kChoiceThreads, 0, stream};
  choice.overlaps = true;
  choice.together = args.members > 1;
  launch<flexprefill_sm90_kernel>(choice, args);
}

}  // namespace heddle
