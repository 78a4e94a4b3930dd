#pragma once
#include "common/lanes.cuh"
#include "common/team.cuh"
#include "core/flexprefill.h"
#include "probe/lines_sm90.h"

// The selection by CTAs, `members` of them on a head at a time and heads in turn; what they do
// before is a warp's sum of each block, and of the strips of each distance if walks leave these
namespace heddle {

constexpr int kMostMembers = 16, kChoiceThreads = 1024;

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
  uint64_t few[CtaTeam::kFew];  // of the list, `found` of them
  uint32_t sizes[kMostMembers], size, found;
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
  constexpr int kAhead = 4;
#pragma unroll 1
  for (int64_t t0 = lane; t0 < sum.count; t0 += kAhead * 32) {
    // What waits for a condition would be waited for before the next
    float mass[kAhead], more[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t t = min(t0 + i * 32, sum.count - 1);
      if (in_strips) {
        const LineStrips::Parts parts = args.strips.parts(head, sk - sq - sum.first - t);
        mass[i] = *parts.first;
        more[i] = parts.second();
      } else {
        mass[i] = sum.from[t];
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t t = t0 + i * 32;
      if (t >= sum.count) break;
      if (in_strips) {
        const LineStrips::Parts parts = args.strips.parts(head, sk - sq - sum.first - t);
        mass[i] = parts.sum(mass[i], more[i]) / static_cast<float>(sq);
        if (!args.task.op.coverage) sum.from[t] = mass[i];
      }
      own += mass[i] * sum.weight(t);
    }
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
    const unsigned long long all = sum_so_far(sums[i], lane);
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
    unsigned long long others = lane < warp ? totals[2 * lane + i] : 0;
    for (int step = 16; step > 0; step /= 2) others += __shfl_xor_sync(~0u, others, step);
    before[i] += others;
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
  const float sure_from = top + 1 < kShareBins ? bin_share(top + 1) : INFINITY,
              listed_from = bin_share(low);
  unsigned long long above = 0;
  // A warp has up to 32 words of a row, a lane writes one of them. Neighbouring rows are of
  // different members, as those near the cut are.
  const uint32_t parts = (words + 31) / 32, count = static_cast<uint32_t>(task.rows) * parts;
  for (uint32_t own = threadIdx.x / 32 * all.members + all.member; own < count;
       own += blockDim.x / 32 * static_cast<uint32_t>(all.members)) {
    const uint32_t row = own / parts, first = (own - row * parts) * 32;
    const int seen = static_cast<int>(visible.seen(row) - first * 32);
    uint32_t at = row * columns + first * 32 + lane, pairs = 0;
    const float* from = map + at;
    // The shares of several words are on their way at once. What nobody sees is loaded as well:
    // whatever waits for a condition is waited for before the next.
    constexpr int kAhead = kFlexSlack / 32;
#pragma unroll 1
    for (int done = 0; done < min(seen, 1024);
         done += kFlexSlack, at += kFlexSlack, from += kFlexSlack) {
      float shares[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) shares[i] = from[i * 32];
      uint32_t here[kAhead], found = 0, to = 0;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const bool sees = done + i * 32 + lane < seen, sure = sees && shares[i] >= sure_from;
        above += static_cast<unsigned long long>((sure ? shares[i] : 0.f) *
                                                 static_cast<float>(kMassSteps));
        const uint32_t all_sure = __ballot_sync(~0u, sure);
        if (lane == done / 32 + i) pairs = all_sure;
        here[i] = __ballot_sync(~0u, sees && shares[i] >= listed_from) & ~all_sure;
        found += static_cast<uint32_t>(__popc(here[i]));
      }
      if (found == 0) continue;
      if (lane == 0) to = atomicAdd(&memory.size, found);
      to = __shfl_sync(~0u, to, 0);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const uint32_t place = to + static_cast<uint32_t>(__popc(here[i] & ((1u << lane) - 1)));
        if (here[i] >> lane & 1 && place < args.room)
          list[place] = rank_of_share(shares[i], at + i * 32);
        to += static_cast<uint32_t>(__popc(here[i]));
      }
    }
    if (first + lane < words) write(row, first + lane, pairs);
  }
  for (int other = 16; other > 0; other /= 2) above += __shfl_xor_sync(~0u, above, other);
  if (lane == 0) atomicAdd(&memory.mass, above);
  __syncthreads();
  if (threadIdx.x == 0) {
    group.masses[all.member] = memory.mass;
    group.sizes[all.member] = memory.size;
  }
  // Everybody counts what is listed by the first digit, but a few. Ranks count from the least, so
  // that this digit tells as many of them apart as it can.
  Histogram& bins = memory.head.bins;
  const uint64_t less = rank_of_share(bin_share(low), -1) - 1;
  Digit digit(1, rank_of_share(bin_share(top + 1), 0) - less);
  const auto mass = [&](int64_t, uint64_t own) { return mass_of_share(share_of(own + less)); };
  if (all.members > 1 || memory.size > CtaTeam::kFew) {
    all.CtaTeam::count(
        bins, min(int64_t{memory.size}, args.room), digit, true,
        [&](int64_t i) { return list[i] - less; }, mass);
    all.share(bins);
  } else {
    __syncthreads();
  }
  int64_t listed = 0;
  bool fits = true;
  for (int i = 0; i < all.members; ++i) {
    wanted.amount -= group.masses[i];
    listed += group.sizes[i];
    fits &= group.sizes[i] <= args.room;
    if (threadIdx.x == 0) memory.sizes[i] = group.sizes[i];
  }
  if (threadIdx.x == 0) memory.found = 0;
  if (!fits) return false;
  __syncthreads();
  const auto rank = [&](int64_t i) {
    int member = 0;
    for (; i >= memory.sizes[member]; ++member) i -= memory.sizes[member];
    return lists[member * args.room + i] - less;
  };
  const auto cut_of = [&]() -> Cut {
    if (listed <= CtaTeam::kFew) return all.few(bins, listed, wanted, rank, mass);
    unsigned long long before = 0;
    const int found = all.crossing(bins, wanted, before);
    if (found < 0) return {1, before};
    const auto held = static_cast<int64_t>(bins.count[found]);
    __syncthreads();
    digit.add(found);
    // Of a bin that few have each CTA looks at all ranks
    if (held > CtaTeam::kFew) return select(all, listed, wanted, rank, mass, bins, digit.next());
    all.each_rank(listed, 0, 1, rank, [&](int64_t, uint64_t own) {
      if (digit.has(own)) memory.few[atomicAdd(&memory.found, 1)] = own;
    });
    __syncthreads();
    return all.few(
        bins, held, wanted, [&](int64_t i) { return memory.few[i]; }, mass);
  };
  const uint64_t floor = flexprefill_floor(task.op, cut_of());
  for (uint32_t i = threadIdx.x; i < memory.size; i += blockDim.x) {
    if (list[i] - less <= floor) continue;
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
    // Others may still look at what the next head writes
    if (head + args.group_count < args.task.heads) all.meet();
    // Nobody looks at them any more; who counts next finds nothing
    for (int64_t i = int64_t{blockDim.x} * all.member + threadIdx.x; i < kShareBins;
         i += int64_t{blockDim.x} * all.members)
      args.task.bins[head * kShareBins + i] = 0;
  }
}

}  // namespace heddle
