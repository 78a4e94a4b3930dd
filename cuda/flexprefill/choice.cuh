#pragma once
#include "common/team.cuh"
#include "core/flexprefill.h"

// The selection by CTAs, `members` of them on a head at a time and heads in turn; what they do
// before is a warp's sum of each block
namespace heddle {

struct FlexArgs {
  FlexTask task;
  GroupMemory* groups;
  int group_count, members;
};

__device__ inline void flexprefill_sum(const FlexArgs& args, int64_t warp) {
  const int64_t nk = args.task.nk, lane = threadIdx.x % 32;
  // The groups that follow find nothing left by others
  auto* words = reinterpret_cast<uint32_t*>(args.groups);
  const int64_t all = args.group_count * static_cast<int64_t>(sizeof(GroupMemory) / 4);
  for (int64_t i = warp * 32 + lane; i < all; i += args.task.heads * 2 * nk * 32) words[i] = 0;
  if (warp >= args.task.heads * 2 * nk) return;
  const FlexSum sum(args.task, warp / nk / 2, warp / nk % 2, warp % nk);
  float own = 0;
  for (int64_t t = lane; t < sum.count; t += 32) own += sum(t);
  for (int step = 16; step > 0; step /= 2) own += __shfl_xor_sync(~0u, own, step);
  if (lane == 0) *sum.to = own;
}

__device__ inline void flexprefill_choose(const FlexArgs& args, int cta, FlexMemory& memory) {
  const int group = cta / args.members;
  const CtaGroup all(args.groups[group], cta % args.members, args.members);
  for (int64_t head = group; head < args.task.heads; head += args.group_count)
    flexprefill_head(CtaTeam{}, all, args.task, head, memory);
}

}  // namespace heddle
