#pragma once
#include "common/team.cuh"
#include "core/flexprefill.h"
#include "probe/lines_sm90.h"

// The selection by CTAs, `members` of them on a head at a time and heads in turn; what they do
// before is a warp's sum of each block, and of the strips of each distance if walks leave these
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
  LineStrips strips;  // none if distances are there
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
  const int64_t head = line / 2, sk = args.task.sk, sq = min(args.task.op.block, args.task.sq);
  const bool in_strips = line % 2 == 1 && args.strips.count > 0;
#pragma unroll 4
  for (int64_t t = lane; t < sum.count; t += 32) {
    float mass;
    if (in_strips) {
      mass = args.strips.sum(head, sk - sq - sum.first - t) / static_cast<float>(sq);
      if (!args.task.op.coverage) sum.from[t] = mass;
    } else {
      mass = sum.from[t];
    }
    own += mass * sum.weight(t);
  }
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

// Marks the pairs of a map: one pass adds up and writes what surely belongs, and lists what may
// belong, which then is selected from
template <class Write>
__device__ bool flexprefill_pairs(const FlexArgs& args, const CtaGroup& all, FlexGroup& group,
                                  int64_t head, FlexShared& memory, const FlexTriangle& visible,
                                  Wanted wanted, const Write& write) {
  const FlexTask& task = args.task;
  flexprefill_bins(task.bins + head * kShareBins, wanted.amount, memory);
  if (memory.top < 0) return false;
  if (threadIdx.x == 0) {
    memory.mass = 0;
    memory.size = 0;
  }
  __syncthreads();
  uint64_t* lists = args.list + (&group - args.groups) * all.members * args.room;
  uint64_t* list = lists + all.member * args.room;
  const int lane = static_cast<int>(threadIdx.x) % 32, top = memory.top, low = memory.low;
  const float* map = task.map + head * task.rows * task.nk;
  auto* bits =
      static_cast<uint32_t*>(task.op.blocks.data) + head * task.rows * task.op.blocks.shape[3];
  const auto words = static_cast<uint32_t>(task.op.blocks.shape[3]),
             columns = static_cast<uint32_t>(task.nk);
  const auto count = static_cast<uint32_t>(task.rows) * words;
  unsigned long long above = 0;
  // A warp has up to 32 words, a lane writes one of them; the shares of several are on their way at
  // once
  constexpr int kAhead = 8;
  const uint32_t warps = blockDim.x / 32 * static_cast<uint32_t>(all.members),
                 each = min(32u, (count + warps - 1) / warps);
  for (uint32_t first = (blockDim.x / 32 * all.member + threadIdx.x / 32) * each; first < count;
       first += warps * each) {
    const uint32_t own = first + lane, own_row = own / words, own_word = own - own_row * words;
    const bool writes = lane < static_cast<int>(each) && own < count;
    const int seen = writes ? static_cast<int>(visible.seen(own_row) - own_word * 32) : 0;
    const uint32_t from = own_row * columns + own_word * 32;
    uint32_t pairs = 0;
    const uint32_t some = __ballot_sync(~0u, seen > 0);
#pragma unroll 1
    for (int other = 0; other < static_cast<int>(each); other += kAhead) {
      if ((some >> other & ((1u << kAhead) - 1)) == 0) continue;
      float shares[kAhead];
      uint32_t at[kAhead], here[kAhead], found = 0, to = 0;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        at[i] = __shfl_sync(~0u, from, other + i) + lane;
        shares[i] = lane < __shfl_sync(~0u, seen, other + i) ? map[at[i]] : NAN;
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int bin = shares[i] >= 0 ? share_bin(shares[i]) : -1;
        const uint32_t sure = __ballot_sync(~0u, bin > top);
        if (bin > top) above += mass_of_share(shares[i]);
        if (lane == other + i) pairs = sure;
        here[i] = __ballot_sync(~0u, bin >= low && bin <= top);
        found += static_cast<uint32_t>(__popc(here[i]));
      }
      if (found == 0) continue;
      if (lane == 0) to = atomicAdd(&memory.size, found);
      to = __shfl_sync(~0u, to, 0);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const uint32_t place = to + static_cast<uint32_t>(__popc(here[i] & ((1u << lane) - 1)));
        if (here[i] >> lane & 1 && place < args.room) list[place] = rank_of_share(shares[i], at[i]);
        to += static_cast<uint32_t>(__popc(here[i]));
      }
    }
    if (writes) write(own_row, own_word, pairs);
  }
  for (int other = 16; other > 0; other /= 2) above += __shfl_xor_sync(~0u, above, other);
  if (lane == 0) atomicAdd(&memory.mass, above);
  __syncthreads();
  if (threadIdx.x == 0) {
    group.masses[all.member] = memory.mass;
    group.sizes[all.member] = memory.size;
  }
  all.meet();
  int64_t listed = 0;
  bool fits = true;
  for (int i = 0; i < all.members; ++i) {
    wanted.amount -= group.masses[i];
    listed += group.sizes[i];
    fits &= group.sizes[i] <= args.room;
    if (threadIdx.x == 0) memory.sizes[i] = group.sizes[i];
  }
  if (!fits) return false;
  __syncthreads();
  const auto rank = [&](int64_t i) {
    int member = 0;
    for (; i >= memory.sizes[member]; ++member) i -= memory.sizes[member];
    return lists[member * args.room + i];
  };
  const auto mass = [](int64_t, uint64_t own) { return mass_of_share(share_of(own)); };
  const Digit digit(rank_of_share(bin_share(low), -1), rank_of_share(bin_share(top + 1), 0));
  const uint64_t floor =
      flexprefill_floor(task.op, select(all, listed, wanted, rank, mass, memory.head.bins, digit));
  for (uint32_t i = threadIdx.x; i < memory.size; i += blockDim.x) {
    if (list[i] <= floor) continue;
    const auto at = ~static_cast<uint32_t>(list[i] >> 2), row = at / columns, c = at % columns;
    atomicOr(&bits[row * words + c / 32], 1u << c % 32);
  }
  return true;
}

__device__ inline void flexprefill_choose(const FlexArgs& args, int cta, FlexShared& memory) {
  FlexGroup& group = args.groups[cta / args.members];
  const CtaGroup all(group.group, cta % args.members, args.members);
  for (int64_t head = cta / args.members; head < args.task.heads; head += args.group_count) {
    flexprefill_head(CtaTeam{}, all, args.task, head, memory.head,
                     [&](const FlexTriangle& visible, const Wanted& wanted, const auto& write) {
                       return flexprefill_pairs(args, all, group, head, memory, visible, wanted,
                                                write);
                     });
    // Nobody looks at them any more; who counts next finds nothing
    for (int64_t i = int64_t{blockDim.x} * all.member + threadIdx.x; i < kShareBins;
         i += int64_t{blockDim.x} * all.members)
      args.task.bins[head * kShareBins + i] = 0;
  }
}

}  // namespace heddle
