#include "flexprefill/choice_sm90.h"

#include "common/launch.h"
#include "common/sm90.cuh"
#include "flexprefill/choice.cuh"
#include "flexprefill/decide.cuh"

namespace heddle {
namespace {

constexpr int kSumThreads = 256, kFewThreads = 512;
constexpr int64_t kManyPairs = int64_t{1} << 19;

__global__ void __launch_bounds__(kDecideThreads, kDecideCtas)
    flexprefill_decide_sm90_kernel(const __grid_constant__ DecideArgs args) {
  __shared__ DecideShared memory;
  sm90::let_next_begin();
  sm90::await_previous();
  flexprefill_decide_cta(args, args.ctas_of_head(), blockIdx.x, memory);
}

__global__ void __launch_bounds__(kSumThreads)
    flexprefill_sums_sm90_kernel(const __grid_constant__ FlexArgs args) {
  sm90::let_next_begin();
  flexprefill_sum(args, (blockIdx.x * int64_t{kSumThreads} + threadIdx.x) / 32);
  if (blockIdx.x == 0) sm90::await_previous();
}

__global__ void __launch_bounds__(FlexCounts::kThreads)
    flexprefill_count_sm90_kernel(const __grid_constant__ FlexArgs args, int64_t run) {
  auto& memory = sm90::shared_memory<FlexCounts>();
  sm90::let_next_begin();
  sm90::await_previous();
  flexprefill_count(args, run, blockIdx.x, memory);
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    flexprefill_sm90_kernel(const __grid_constant__ FlexArgs args) {
  __shared__ FlexShared memory;
  sm90::await_previous();
  flexprefill_choose(args, static_cast<int>(blockIdx.x), memory);
}

}  // namespace

void prepare_choice_sm90() {
  static uint64_t sums = 0, counts = 0, choice = 0, many = 0;
  allow_shared_memory(reinterpret_cast<const void*>(flexprefill_sums_sm90_kernel), 0, sums);
  allow_shared_memory(reinterpret_cast<const void*>(flexprefill_count_sm90_kernel),
                      sm90::shared_memory_bytes<FlexCounts>(), counts);
  allow_shared_memory(reinterpret_cast<const void*>(flexprefill_sm90_kernel<kFewThreads>), 0,
                      choice);
  allow_shared_memory(reinterpret_cast<const void*>(flexprefill_sm90_kernel<kChoiceThreads>), 0,
                      many);
}

void launch_decide_sm90(DecideArgs args, int processors, cudaStream_t stream) {
  const int64_t tiles = args.task.heads * args.task.nk,
                at_once = int64_t{kDecideCtas} * processors * kDecideWarps * kDecideTiles;
  args.steps = static_cast<int>((tiles + at_once - 1) / at_once);
  const int64_t ctas = args.task.heads * args.ctas_of_head();
  launch<flexprefill_decide_sm90_kernel>({static_cast<int>(ctas), kDecideThreads, 0, stream, true},
                                         args);
}

void launch_choice_sm90(const FlexArgs& args, int processors, cudaStream_t stream) {
  const FlexTask& task = args.task;
  if (args.kinds) {
    const int64_t run = flexprefill_run(task, processors),
                  ctas = task.heads * 2 * ((task.sk + run - 1) / run);
    launch<flexprefill_count_sm90_kernel>({static_cast<int>(ctas), FlexCounts::kThreads,
                                           sm90::shared_memory_bytes<FlexCounts>(), stream, true},
                                          args, run);
  } else {
    const int64_t warps = task.heads * 2 * task.nk, each = kSumThreads / 32;
    launch<flexprefill_sums_sm90_kernel>(
        {static_cast<int>((warps + each - 1) / each), kSumThreads, 0, stream, true}, args);
  }
  Launch choice{args.group_count * args.members, kChoiceThreads, 0, stream, true};
  choice.together = args.members > 1;
  // Where there is little to look at, what a step takes is waiting for instructions
  if (task.rows * task.nk < kManyPairs) {
    choice.threads = kFewThreads;
    return launch<flexprefill_sm90_kernel<kFewThreads>>(choice, args);
  }
  launch<flexprefill_sm90_kernel<kChoiceThreads>>(choice, args);
}

}  // namespace heddle
