#pragma once
#include "common/team.cuh"
#include "core/flexprefill.h"

// The selection by CTAs, `members` of them on a head at a time and heads in turn; what they do
// before is a warp's sum of each block
namespace heddle {

constexpr int kMostMembers = 16;

// What the CTAs of a head share. A member's part of the list has its own size, and beside it is the
// mass of what it found above the list.
struct FlexGroup {
  GroupMemory group;
  unsigned long long masses[kMostMembers];
  uint32_t sizes[kMostMembers];
};

struct FlexArgs {
  FlexTask task;
  FlexGroup* groups;
  uint64_t* list;  // [groups, members, room] ranks
  int64_t room;
  int group_count, members;
};

struct FlexShared {
  FlexMemory head;
  unsigned long long mass;
  uint32_t sizes[kMostMembers], size;
  int top, low;  // bins of the list
};

__device__ inline void flexprefill_sum(const FlexArgs& args, int64_t warp) {
  const int64_t nk = args.task.nk, lane = threadIdx.x % 32;
  // The groups that follow find nothing left by others
  auto* words = reinterpret_cast<uint32_t*>(args.groups);
  const int64_t all = args.group_count * static_cast<int64_t>(sizeof(FlexGroup) / 4);
  for (int64_t i = warp * 32 + lane; i < all; i += args.task.heads * 2 * nk * 32) words[i] = 0;
  if (warp >= args.task.heads * 2 * nk) return;
  // 32 bits make dividing cheap
  const auto number = static_cast<uint32_t>(warp), all_of_line = static_cast<uint32_t>(nk);
  const uint32_t line = number / all_of_line;
  const FlexSum sum(args.task, line / 2, line % 2, number - line * all_of_line);
  float own = 0;
  for (int64_t t = lane; t < sum.count; t += 32) own += sum(t);
  for (int step = 16; step > 0; step /= 2) own += __shfl_xor_sync(~0u, own, step);
  if (lane == 0) *sum.to = own;
}

// Which bins may have the rank that reaches a mass: at least that much lies from bin `low` on if
// shares weigh as little as they may, and less than it above bin `top` if they weigh as much. A
// thread has a run of bins, from the top. `top` is -1 if all of them do not reach it.
__device__ inline void flexprefill_bins(const uint32_t* bins, unsigned long long wanted,
                                        FlexShared& memory) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int threads = static_cast<int>(blockDim.x), run = (kShareBins + threads - 1) / threads;
  const int first = kShareBins - 1 - static_cast<int>(threadIdx.x) * run,
            end = max(first - run, -1);
  const auto mass = [&](int bin, int of) { return bins[bin] * mass_of_share(bin_share(of)); };
  unsigned long long sums[2] = {}, before[2];
  for (int bin = first; bin > end; --bin) {
    sums[0] += mass(bin, bin);
    sums[1] += mass(bin, bin + 1);
  }
  unsigned long long(&totals)[256] = memory.head.bins.count;  // of warps
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    unsigned long long all = sums[i];
    for (int step = 1; step < 32; step *= 2) {
      const unsigned long long more = __shfl_up_sync(~0u, all, step);
      if (lane >= step) all += more;
    }
    before[i] = all - sums[i];
    if (lane == 31) totals[2 * warp + i] = all;
  }
  if (threadIdx.x == 0) {
    memory.top = -1;
    memory.low = 0;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    for (int other = 0; other < warp; ++other) before[i] += totals[2 * other + i];
    if (before[i] >= wanted || before[i] + sums[i] < wanted) continue;
    int bin = first;
    for (; before[i] + mass(bin, bin + i) < wanted; --bin) before[i] += mass(bin, bin + i);
    (i ? memory.top : memory.low) = bin;
  }
  __syncthreads();
}

// select() of a map: what surely belongs is added up, what may belong becomes a list to select from
template <class Rank, class Mass>
__device__ Cut flexprefill_pairs(const FlexArgs& args, const CtaGroup& all, FlexGroup& group,
                                 int64_t head, FlexShared& memory, int64_t n, Wanted wanted,
                                 const Rank& rank, const Mass& mass) {
  Histogram& bins = memory.head.bins;
  flexprefill_bins(args.task.bins + head * kShareBins, wanted.amount, memory);
  if (memory.top < 0) return {1, 0};
  if (threadIdx.x == 0) {
    memory.mass = 0;
    memory.size = 0;
  }
  __syncthreads();
  uint64_t* lists = args.list + (&group - args.groups) * all.members * args.room;
  uint64_t* list = lists + all.member * args.room;
  const int lane = static_cast<int>(threadIdx.x) % 32, top = memory.top, low = memory.low;
  unsigned long long above = 0;
  all.each_rank(n, all.member, all.members, rank, [&](int64_t, uint64_t own) {
    const int bin = own == 0 ? -1 : share_bin(share_of(own));
    if (bin > top) above += mass(0, own);
    const bool may = bin >= low && bin <= top;
    const uint32_t here = __ballot_sync(~0u, may);
    if (here == 0) return;
    uint32_t at = 0;
    if (lane == 0) at = atomicAdd(&memory.size, static_cast<uint32_t>(__popc(here)));
    at = __shfl_sync(~0u, at, 0) + static_cast<uint32_t>(__popc(here & ((1u << lane) - 1)));
    if (may && at < args.room) list[at] = own;
  });
  for (int other = 16; other > 0; other /= 2) above += __shfl_xor_sync(~0u, above, other);
  if (lane == 0) atomicAdd(&memory.mass, above);
  __syncthreads();
  if (threadIdx.x == 0) {
    group.masses[all.member] = memory.mass;
    group.sizes[all.member] = memory.size;
  }
  all.meet();
  int64_t count = 0;
  bool fits = true;
  unsigned long long rest = wanted.amount;
  for (int i = 0; i < all.members; ++i) {
    rest -= group.masses[i];
    count += group.sizes[i];
    fits &= group.sizes[i] <= args.room;
    if (threadIdx.x == 0) memory.sizes[i] = group.sizes[i];
  }
  if (!fits) return select(all, n, wanted, rank, mass, bins);
  __syncthreads();
  const auto listed = [&](int64_t i) {
    int member = 0;
    for (; i >= memory.sizes[member]; ++member) i -= memory.sizes[member];
    return lists[member * args.room + i];
  };
  wanted.amount = rest;
  return select(all, count, wanted, listed, mass, bins);
}

__device__ inline void flexprefill_choose(const FlexArgs& args, int cta, FlexShared& memory) {
  FlexGroup& group = args.groups[cta / args.members];
  const CtaGroup all(group.group, cta % args.members, args.members);
  for (int64_t head = cta / args.members; head < args.task.heads; head += args.group_count) {
    flexprefill_head(CtaTeam{}, all, args.task, head, memory.head,
                     [&](int64_t n, const Wanted& wanted, const auto& rank, const auto& mass) {
                       return flexprefill_pairs(args, all, group, head, memory, n, wanted, rank,
                                                mass);
                     });
    // Nobody looks at them any more; who counts next finds nothing
    for (int64_t i = int64_t{blockDim.x} * all.member + threadIdx.x; i < kShareBins;
         i += int64_t{blockDim.x} * all.members)
      args.task.bins[head * kShareBins + i] = 0;
  }
}

}  // namespace heddle
