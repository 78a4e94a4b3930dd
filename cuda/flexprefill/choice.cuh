#pragma once
#include "common/lanes.cuh"
#include "common/team.cuh"
#include "core/flexprefill.h"
#include "probe/lines_sm90.h"

// The selection by CTAs, `members` of them on a head at a time and heads in turn; what they do
// before is a warp's sum of each block, and of the strips of each distance if walks leave these.
// Where it has been decided which way a head goes, masses of blocks are there, and masses of keys
// and distances are counted before instead: how many there are and what they add up to in bins as
// fine as those of a map.
namespace heddle {

constexpr int kMostMembers = 16, kChoiceThreads = 1024;

// What the CTAs of a head share. A member's part of the list has its own size, and beside it is the
// mass of what it found above the list.
struct FlexGroup {
  GroupMemory group;
  unsigned long long masses[kMostMembers];
  uint32_t sizes[kMostMembers];
};

// How many tokens a bin has in the upper bits, and what they add up to, which is about 1 at most,
// in the lower ones
using FlexBin = unsigned long long;
constexpr int kBinMass = 42;
constexpr int64_t kMostCounted = int64_t{1} << (64 - kBinMass);

struct FlexArgs {
  FlexTask task;
  FlexGroup* groups;
  uint64_t* list;  // [groups, members, room] ranks
  int64_t room;
  int group_count, members;
  LineStrips strips;     // none if distances are there
  const int32_t* kinds;  // [heads], or null: what is decided
  FlexBin* line_bins;    // [heads, 2, kShareBins], if that is decided
};

struct FlexShared {
  FlexMemory head;
  unsigned long long mass;
  uint64_t few[CtaTeam::kFew];  // of the list, `found` of them
  uint32_t sizes[kMostMembers], size, found;
  int top, low;  // bins of the list
};

// The groups that follow find nothing left by others
__device__ inline void flexprefill_clear(const FlexArgs& args, int64_t thread, int64_t threads) {
  auto* words = reinterpret_cast<uint32_t*>(args.groups);
  const int64_t all = args.group_count * static_cast<int64_t>(sizeof(FlexGroup) / 4);
  for (int64_t i = thread; i < all; i += threads) words[i] = 0;
}

__device__ inline void flexprefill_sum(const FlexArgs& args, int64_t warp) {
  const int64_t nk = args.task.nk, lane = threadIdx.x % 32;
  flexprefill_clear(args, warp * 32 + lane, args.task.heads * 2 * nk * 32);
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
  own = warp_sum(own);
  if (lane == 0) *sum.to = own;
}

// What CTAs count of a run of tokens, of which masses add up to about 1: neither half of a sum
// becomes too large for its word
struct FlexCounts {
  static constexpr int kThreads = 512, kLow = 16;
  static constexpr int64_t kMost = 32768;
  uint32_t count[kShareBins], low[kShareBins], high[kShareBins];
};

// Tokens of a CTA: few enough for all processors, enough for what a CTA has to clear and to add
HEDDLE_HD inline int64_t flexprefill_run(const FlexTask& task, int processors) {
  const int64_t own = task.heads * 2 * task.sk / (4 * processors);
  return own < 2048 ? 2048 : own < FlexCounts::kMost ? own : FlexCounts::kMost;
}

// Counts a run of keys, as far as they matter, or of distances, which are written as well: what is
// there are strips
__device__ inline void flexprefill_count(const FlexArgs& args, int64_t run, int64_t cta,
                                         FlexCounts& memory) {
  const FlexTask& task = args.task;
  const int64_t sk = task.sk, runs = (sk + run - 1) / run, line = cta / runs, head = line / 2;
  const auto thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  flexprefill_clear(args, cta * threads + thread, task.heads * 2 * runs * threads);
  if (args.kinds[head] != kFlexLines) return;
  // There are fewer than kMostCounted
  const auto begin = static_cast<int>(cta % runs * run),
             end = static_cast<int>(min(begin + run, sk)),
             queries = static_cast<int>(min(task.op.block, task.sq)),
             newest = static_cast<int>(sk) - queries;
  float* from = task.lines + line * sk;
  // All that weighs less is less than what gamma leaves
  const float least = (1 - static_cast<float>(task.op.gamma)) / 2 / static_cast<float>(sk),
              share = 1.f / static_cast<float>(queries);
  for (int i = thread; i < kShareBins; i += threads)
    memory.count[i] = memory.low[i] = memory.high[i] = 0;
  __syncthreads();
  const auto add = [&](float mass) {
    if (!(mass >= least)) return;
    // In steps of 2^-40, of which the upper ones are whole numbers of f32
    const float steps = mass * 0x1p24f;
    const auto high = static_cast<uint32_t>(steps);
    const int bin = share_bin(mass);
    atomicAdd(&memory.count[bin], 1u);
    atomicAdd(&memory.high[bin], high);
    atomicAdd(&memory.low[bin],
              static_cast<uint32_t>((steps - static_cast<float>(high)) * 0x1p16f));
  };
  constexpr int kAhead = 4;
  if (line % 2 == 0) {
#pragma unroll 1
    for (int t = begin + thread; t < end; t += kAhead * threads) {
      float mass[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) mass[i] = from[min(t + i * threads, end - 1)];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (t + i * threads < end) add(mass[i]);
    }
  } else {
    const auto length = static_cast<int>(args.strips.length);
    const float* strips = args.strips.of(head, 0);
    // The strip of the key that query 0 would see, as distances grow
    int s = max(newest - begin - thread, 0) / length;
#pragma unroll 1
    for (int t = begin + thread; t < end; t += kAhead * threads) {
      // What waits for a condition would be waited for before the next
      LineStrips::Parts parts[kAhead];
      float mass[kAhead], more[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int key = newest - min(t + i * threads, end - 1);
        while (s > 0 && key < s * length) --s;
        parts[i] = args.strips.parts(strips, s, key);
        mass[i] = *parts[i].first;
        more[i] = parts[i].second();
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (t + i * threads >= end) break;
        mass[i] = parts[i].sum(mass[i], more[i]) * share;
        from[t + i * threads] = mass[i];
        add(mass[i]);
      }
    }
  }
  __syncthreads();
  for (int i = thread; i < kShareBins; i += threads) {
    if (memory.count[i] == 0) continue;
    atomicAdd(&args.line_bins[line * kShareBins + i],
              (static_cast<FlexBin>(memory.count[i]) << kBinMass) +
                  (static_cast<FlexBin>(memory.high[i]) << FlexCounts::kLow) + memory.low[i]);
  }
}

// A thread's run of bins, from the top: two sums over it, and over those of the threads before.
// `top` of the memory is -1 then, and `low` 0, for all to see.
struct BinRun {
  int first;
  unsigned long long sums[2] = {}, before[2];

  // `sum(bin, i)` is what a bin adds to each
  template <class Sum> __device__ BinRun(FlexShared& memory, const Sum& sum) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int threads = static_cast<int>(blockDim.x), run = (kShareBins + threads - 1) / threads;
    first = kShareBins - 1 - static_cast<int>(threadIdx.x) * run;
    for (int bin = first; bin > max(first - run, -1); --bin)
#pragma unroll
      for (int i = 0; i < 2; ++i) sums[i] += sum(bin, i);
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
    for (int i = 0; i < 2; ++i) before[i] += warp_sum(lane < warp ? totals[2 * lane + i] : 0);
  }
};

// Which bins may have the rank that reaches a mass: at least that much lies from bin `low` on if
// shares weigh as little as they may, and less than it above bin `top` if they weigh as much. `top`
// is -1 if all of them do not reach it.
__device__ inline void flexprefill_bins(const uint32_t* bins, unsigned long long wanted,
                                        FlexShared& memory) {
  const auto mass = [&](int bin, int i) { return bins[bin] * mass_of_share(bin_share(bin + i)); };
  BinRun run(memory, mass);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    unsigned long long& before = run.before[i];
    if (before >= wanted || before + run.sums[i] < wanted) continue;
    int bin = run.first;
    for (; before + mass(bin, i) < wanted; --bin) before += mass(bin, i);
    (i ? memory.top : memory.low) = bin;
  }
  __syncthreads();
}

// How many tokens of a line reach a mass, or another number that is as good, or -1
__device__ inline int64_t flexprefill_tokens(const FlexArgs& args, const CtaTeam& own, int64_t head,
                                             int line, const Wanted& wanted, FlexShared& memory) {
  const FlexBin* bins = args.line_bins + (head * 2 + line) * kShareBins;
  const auto mass_in = [&](int bin) { return bins[bin] & ((FlexBin{1} << kBinMass) - 1); };
  const auto count_in = [&](int bin) { return bins[bin] >> kBinMass; };
  BinRun run(memory, [&](int bin, int i) { return i == 0 ? mass_in(bin) : count_in(bin); });
  if (run.before[0] < wanted.amount && run.before[0] + run.sums[0] >= wanted.amount) {
    int bin = run.first;
    for (; run.before[0] + mass_in(bin) < wanted.amount; --bin) {
      run.before[0] += mass_in(bin);
      run.before[1] += count_in(bin);
    }
    memory.top = bin;
    memory.mass = wanted.amount - run.before[0];
    memory.size = static_cast<uint32_t>(run.before[1]);
  }
  if (threadIdx.x == 0) memory.found = 0;
  __syncthreads();
  const int top = memory.top;
  if (top < 0) return -1;
  // Of the bin that crosses it, if all weigh as much as they may or as little
  const unsigned long long rest = memory.mass, held = count_in(top),
                           most = mass_of_share(bin_share(top + 1)),
                           least = mass_of_share(bin_share(top));
  const int64_t above = memory.size;
  const auto fewest = static_cast<int64_t>((rest + most - 1) / most);
  const auto all = static_cast<int64_t>(least > 0 ? min((rest + least - 1) / least, held) : held);
  const auto grain = static_cast<int64_t>(wanted.grain);
  if ((above + fewest) / grain == (above + all) / grain) return above + fewest;
  if (held > CtaTeam::kFew) return -1;
  // Which are they?
  const float* tokens = args.task.lines + (head * 2 + line) * args.task.sk;
  own.each_rank(
      args.task.sk, 0, 1, [&](int64_t i) { return rank_of_share(tokens[i], i); },
      [&](int64_t, uint64_t rank) {
        if (rank == 0 || share_bin(share_of(rank)) != top) return;
        const uint32_t at = atomicAdd(&memory.found, 1u);
        if (at < CtaTeam::kFew) memory.few[at] = rank;
      });
  __syncthreads();
  // Of the bin in which counting begins, and of masses that don't add up to 1, there are others
  if (memory.found != held) return -1;
  const auto mass = [](int64_t, uint64_t rank) { return mass_of_share(share_of(rank)); };
  return above + static_cast<int64_t>(own.few(
                                             memory.head.bins, static_cast<int64_t>(held),
                                             Wanted{true, rest},
                                             [&](int64_t i) { return memory.few[i]; }, mass)
                                          .count);
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
  above = warp_sum(above);
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

// What is found by one of the CTAs of a head, whose bins say where to look
struct FlexCta {
  const FlexArgs& args;
  const CtaGroup& all;
  FlexGroup& group;
  int64_t head;
  FlexShared& memory;

  template <class Write>
  __device__ bool pairs(const FlexTriangle& visible, const Wanted& wanted,
                        const Write& write) const {
    return flexprefill_pairs(args, all, group, head, memory, visible, wanted, write);
  }
  __device__ int64_t tokens(int line, const Wanted& wanted) const {
    return args.line_bins ? flexprefill_tokens(args, all, head, line, wanted, memory) : -1;
  }
};

__device__ inline void flexprefill_choose(const FlexArgs& args, int cta, FlexShared& memory) {
  FlexGroup& group = args.groups[cta / args.members];
  const CtaGroup all(group.group, cta % args.members, args.members);
  const CtaTeam own;
  for (int64_t head = cta / args.members; head < args.task.heads; head += args.group_count) {
    FlexKind kind = args.kinds ? static_cast<FlexKind>(args.kinds[head])
                               : flexprefill_decide(own, args.task, head, memory.head);
    if (args.kinds && kind == kFlexAware && !flexprefill_finite(own, args.task, head, memory.head))
      kind = kFlexAll;
    flexprefill_head(own, all, args.task, head, kind, memory.head,
                     FlexCta{args, all, group, head, memory});
    // Others may still look at what the next head writes
    if (head + args.group_count < args.task.heads) all.meet();
    // Nobody looks at them any more; who counts next finds nothing
    const auto clear = [&](auto* bins, int64_t count) {
      for (int64_t i = int64_t{blockDim.x} * all.member + threadIdx.x; i < count;
           i += int64_t{blockDim.x} * all.members)
        bins[i] = 0;
    };
    if (kind == kFlexLines && args.line_bins)
      clear(args.line_bins + head * 2 * kShareBins, 2 * kShareBins);
    else
      clear(args.task.bins + head * kShareBins, kShareBins);
  }
}

}  // namespace heddle
