#include <algorithm>
#include <optional>

#include "common/elements.cuh"
#include "common/launch.h"
#include "core/slot.h"
#include "flexprefill/choice.cuh"
#include "flexprefill/choice_sm90.h"
#include "flexprefill/decide.cuh"
#include "probe/lines.h"

namespace heddle {
namespace {

// Entries that a CTA should have before others help it: meeting takes a microsecond
constexpr int64_t kShare = 8192;
constexpr int64_t kManyBlocks = 8192;

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
  const auto allocate = [&](int64_t count) {
    return context.scratch<float>(static_cast<size_t>(count));
  };
  FlexTask task(op, allocate);
  const int64_t heads = task.heads, nk = task.nk;
  if (heads == 0) return;
  const auto probe = [&](const Probe& own) { cuda_slot(Probe::kName)(&own, context); };
  const Probe lines = task.probe_lines();
  const bool in_planes = !declines_shares(lines, context),
             walks = !declines_lines_sm90(lines, context);
  // Blocks of queries and of keys are the tiles of a walk, so that the first is enough to decide
  const bool early = walks && in_planes && !op.coverage && op.block == 128 && task.sq >= op.block &&
                     task.sk < kMostCounted;
  if (early) task.set_apart(allocate);
  // Masses of lines, counts of them and of maps, and arrivals at a head
  constexpr int64_t kBins = kShareBins;
  int* counters = context.counters(static_cast<size_t>(heads * (early ? 5 * kBins + 1 : kBins)));
  task.bins = reinterpret_cast<uint32_t*>(counters) + (early ? heads * 4 * kBins : 0);
  int32_t* kinds = early ? context.scratch<int32_t>(static_cast<size_t>(heads)) : nullptr;
  const int64_t signals = 1 + heads * ((task.rows + kReadyBlocks - 1) / kReadyBlocks);
  int* ready = nullptr;
  const Probe map = task.probe_map(), estimate = task.probe_estimate();
  const Means means(map, in_planes, context);
  std::optional<Means> last;
  if (!task.whole) last.emplace(estimate, in_planes, context, &means);
  LineStrips strips{};
  if (early) {
    LinesCall call = lines_sm90(lines, {means.k, last->q}, true, context);
    run_stats_sm90(call, context);
    call.kinds = kinds;
    call.later = means.q;
    call.next = context.scratch<int>(static_cast<size_t>(signals));
    call.ready = ready = call.next + 1;
    // Where a map takes long, it begins beside means
    call.spares = heads * task.rows >= kManyBlocks;
    launch_decide_sm90(
        {task, call.stats, call.first.parts, call.bands, means.k, last->q, kinds,
         context.scratch<float>(static_cast<size_t>(heads * 2 * nk)), counters + heads * 5 * kBins,
         call.next, static_cast<int>(signals), static_cast<float>(estimate.scale)},
        context.processors, context.stream);
    run_lines_sm90(call, context);
    strips = call.strips;
  } else if (walks) {
    const LinesCall call = lines_sm90(lines, {means.q, means.k}, false, context);
    run_stats_sm90(call, context);
    run_lines_sm90(call, context);
    strips = call.strips;
  } else {
    probe(lines);
    run_means(means, context);
  }
  const auto multiply = [&](const Probe& own, const Means& means, uint32_t* bins) {
    in_planes ? run_shares(own, means, bins, kinds, ready, context)
              : run_products(own, means, bins, context);
  };
  if (last && !early) {
    run_means(*last, context);
    multiply(estimate, *last, nullptr);
  }
  const int64_t entries = std::max(task.sk, task.rows * nk);
  const int64_t members =
      std::clamp<int64_t>(std::min(entries / kShare, context.processors / heads), 1, kMostMembers);
  const int64_t groups = std::min<int64_t>(heads, context.processors / members);
  // Of a map one pair in sixteen should be near the cut, of a small one all may be
  const int64_t room = std::max(entries / members / 8, int64_t{4096});
  const FlexArgs args{task,
                      context.scratch<FlexGroup>(static_cast<size_t>(groups)),
                      context.scratch<uint64_t>(static_cast<size_t>(groups * members * room)),
                      room,
                      static_cast<int>(groups),
                      static_cast<int>(members),
                      strips,
                      kinds,
                      early ? reinterpret_cast<FlexBin*>(counters) : nullptr};
  const int64_t warps = heads * 2 * nk;
  HEDDLE_CHECK(warps < INT32_MAX, kUnsupported, "map", "map has too many heads for one call");
  // Only the choice clears what a map counts: nothing in between may fail
  if (in_planes) {
    prepare_choice_sm90();
    multiply(map, means, task.bins);
    return launch_choice_sm90(args, context.processors, context.stream);
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
