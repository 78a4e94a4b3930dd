#include <algorithm>

#include "common/elements.cuh"
#include "common/launch.h"
#include "core/slot.h"
#include "flexprefill/choice.cuh"
#include "flexprefill/choice_sm90.h"
#include "probe/lines.h"

namespace heddle {
namespace {

// Entries that a CTA should have before others help it: meeting takes a microsecond
constexpr int64_t kShare = 8192;

__global__ void __launch_bounds__(kThreads)
    flexprefill_sums_kernel(const __grid_constant__ FlexArgs args) {
  flexprefill_sum(args, (blockIdx.x * int64_t{kThreads} + threadIdx.x) / 32);
}

__global__ void __launch_bounds__(kChoiceThreads)
    flexprefill_kernel(const __grid_constant__ FlexArgs args) {
  __shared__ FlexShared memory;
  flexprefill_choose(args, static_cast<int>(blockIdx.x), memory);
}

void run(const FlexPrefill& op, CudaContext& context) {
  FlexTask task(op,
                [&](int64_t count) { return context.scratch<float>(static_cast<size_t>(count)); });
  const int64_t heads = task.heads, nk = task.nk;
  if (heads == 0) return;
  const auto probe = [&](const Probe& own) { cuda_slot(Probe::kName)(&own, context); };
  const Probe lines = task.probe_lines(), map = task.probe_map();
  const bool in_planes = !declines_shares(map, context);
  const auto multiply = [&](const Probe& own, const Means& means, uint32_t* bins) {
    in_planes ? run_shares(own, means, bins, context) : run_products(own, means, bins, context);
  };
  const Means means(map, in_planes, context);
  LineStrips strips{};
  if (declines_lines_sm90(lines, context)) {
    probe(lines);
    run_means(means, context);
  } else {
    strips = run_lines_sm90(lines, &means, context);
  }
  if (!task.whole) {
    const Probe estimate = task.probe_estimate();
    const Means last(estimate, in_planes, context, &means);
    run_means(last, context);
    multiply(estimate, last, nullptr);
  }
  const int64_t entries = std::max(task.sk, task.rows * nk);
  const int64_t members =
      std::clamp<int64_t>(std::min(entries / kShare, context.processors / heads), 1, kMostMembers);
  const int64_t groups = std::min<int64_t>(heads, context.processors / members);
  // Of a map one pair in sixteen should be near the cut, of a small one all may be
  const int64_t room = std::max(entries / members / 8, int64_t{4096});
  task.bins =
      reinterpret_cast<uint32_t*>(context.counters(static_cast<size_t>(heads) * kShareBins));
  const FlexArgs args{task,
                      context.scratch<FlexGroup>(static_cast<size_t>(groups)),
                      context.scratch<uint64_t>(static_cast<size_t>(groups * members * room)),
                      room,
                      static_cast<int>(groups),
                      static_cast<int>(members),
                      strips};
  const int64_t warps = heads * 2 * nk;
  HEDDLE_CHECK(warps < INT32_MAX, kUnsupported, "map", "map has too many heads for one call");
  // Only the choice clears what a map counts: nothing in between may fail
  if (in_planes) {
    prepare_choice_sm90();
    multiply(map, means, task.bins);
    return launch_choice_sm90(args, context.stream);
  }
  constexpr int kWarps = kThreads / 32;
  flexprefill_sums_kernel<<<static_cast<unsigned>((warps + kWarps - 1) / kWarps), kThreads, 0,
                            context.stream>>>(args);
  context.launched("flexprefill_sums_kernel");
  multiply(map, means, task.bins);
  Launch choice{static_cast<int>(groups * members), kChoiceThreads, 0, context.stream};
  choice.together = members > 1;
  launch<flexprefill_kernel>(choice, args);
}

HEDDLE_REGISTER(FlexPrefill);

}  // namespace
}  // namespace heddle
