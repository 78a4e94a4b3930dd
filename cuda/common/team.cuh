#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "common/lanes.cuh"
#include "core/select.h"

namespace heddle {

// The threads of a CTA as a team, for what core/select.h writes for teams. What they add to is
// shared memory or the CTA's own.
struct CtaTeam {
  template <class Body> __device__ void each(int64_t n, const Body& body) const {
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) body(i);
    __syncthreads();
  }
  template <class Bit, class Body>
  __device__ void words(int64_t n, const Bit& bit, const Body& body) const {
    gather(n, 0, 1, bit, body);
    __syncthreads();
  }
  template <class Rank, class Mass>
  __device__ void count(Histogram& bins, int64_t n, const Digit& digit, bool by_mass,
                        const Rank& rank, const Mass& mass) const {
    tally(bins, n, 0, 1, digit, by_mass, rank, mass);
  }
  template <class Value>
  __device__ void sum(unsigned long long& to, int64_t n, const Value& value) const {
    unsigned long long own = 0;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x)
      own += static_cast<unsigned long long>(value(i));
    own = warp_sum(own);
    if (threadIdx.x % 32 == 0 && own != 0) atomicAdd(&to, own);
    __syncthreads();
  }
  template <class Value> __device__ void highest(float& to, int64_t n, const Value& value) const {
    float own = 0;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) own = fmaxf(own, value(i));
    own = warp_max(own);
    if (threadIdx.x % 32 == 0) raise(to, own);
    __syncthreads();
  }
  // Numbers from 0 on are ordered as their bits are
  __device__ void raise(float& x, float y) const {
    atomicMax(reinterpret_cast<int*>(&x), __float_as_int(y));
  }
  __device__ void raise(uint32_t& x, uint32_t y) const { atomicMax(&x, y); }
  // A stretch of blockDim.x entries at a time; every warp counts those of the warps before it
  template <class Chosen, class Place>
  __device__ void compact(int64_t n, const Chosen& chosen, const Place& place) const {
    __shared__ uint32_t found[32];
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int64_t at = 0;
    for (int64_t first = 0; first < n; first += blockDim.x) {
      const int64_t i = first + threadIdx.x;
      const bool own = i < n && chosen(i);
      const uint32_t mine = __ballot_sync(~0u, own);
      if (lane == 0) found[warp] = mine;
      __syncthreads();
      int64_t before = at + __popc(mine & ((1u << lane) - 1));
      for (uint32_t other = 0; other < warps; ++other) {
        const int count = __popc(found[other]);
        if (other < warp) before += count;
        at += count;
      }
      if (own) place(i, before);
      __syncthreads();
    }
  }
  __device__ void wait() const { __syncthreads(); }
  // Each thread has a rank and compares it with all others; where a number of many is wanted, all
  // find the bits of a rank from which on there are as many
  static constexpr int64_t kFew = 256;
  __device__ int64_t few_of(const Wanted& wanted) const {
    return wanted.by_mass ? kFew : max(kFew, int64_t{blockDim.x});
  }
  template <class Rank, class Mass>
  __device__ Cut few(Histogram& bins, int64_t n, const Wanted& wanted, const Rank& rank,
                     const Mass& mass) const {
    if (!wanted.by_mass && n > 16 && n <= blockDim.x) {
      const uint64_t own = threadIdx.x < n ? rank(threadIdx.x) : 0;
      const auto all = static_cast<unsigned long long>(__syncthreads_count(own != 0));
      if (all < wanted.amount) return {1, all};
      uint64_t least = 0;
      for (uint64_t bit = uint64_t{1} << 63; bit != 0; bit >>= 1) {
        const auto above =
            static_cast<unsigned long long>(__syncthreads_count(own >= (least | bit)));
        if (above >= wanted.amount) least |= bit;
        if (above == wanted.amount) break;
      }
      return {least, wanted.amount, least};
    }
    each(n, [&](int64_t i) {
      const uint64_t own = rank(i);
      bins.count[i] = own;
      bins.mass[i] = own == 0 ? 0 : wanted.by_mass ? mass(i, own) : 1;
    });
    if (threadIdx.x == 0) bins.cut = {1, 0};
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
      const uint64_t own = bins.count[i];
      if (own == 0) continue;
      unsigned long long above = 0, number = 1;
#pragma unroll 4
      for (int64_t other = 0; other < n; ++other)
        if (bins.count[other] > own) {
          above += bins.mass[other];
          ++number;
        }
      if (above < wanted.amount && above + bins.mass[i] >= wanted.amount)
        bins.cut = {own, number, own};
    }
    __syncthreads();
    Cut cut = bins.cut;
    for (int64_t i = 0; cut.least == 1 && i < n; ++i) cut.count += bins.count[i] != 0;
    __syncthreads();
    return cut;
  }
  // Every warp does it for itself: a lane adds up 8 bins, and the one that has the crossing walks
  // them
  __device__ int crossing(const Histogram& bins, Wanted& wanted, unsigned long long& above) const {
    constexpr int kBins = 256 / 32;
    const int lane = threadIdx.x % 32, top = 255 - lane * kBins;
    unsigned long long count = 0, amount = 0;
    for (int digit = top; digit > top - kBins; --digit) {
      count += bins.count[digit];
      amount += wanted.by_mass ? bins.mass[digit] : bins.count[digit];
    }
    unsigned long long counts = count, amounts = amount;  // with those of the lanes before
    for (int step = 1; step < 32; step *= 2) {
      const unsigned long long more_count = __shfl_up_sync(~0u, counts, step);
      const unsigned long long more = __shfl_up_sync(~0u, amounts, step);
      if (lane < step) continue;
      counts += more_count;
      amounts += more;
    }
    const uint32_t reached = __ballot_sync(~0u, amounts >= wanted.amount);
    if (reached == 0) {
      above += __shfl_sync(~0u, counts, 31);
      return -1;
    }
    Wanted rest{wanted.by_mass, wanted.amount - (amounts - amount), wanted.grain};
    unsigned long long before = counts - count;
    int digit = 0;
    const int owner = __ffs(static_cast<int>(reached)) - 1;
    if (lane == owner) digit = crossing_of(bins, top, top - kBins + 1, rest, before);
    wanted.amount = __shfl_sync(~0u, rest.amount, owner);
    above += __shfl_sync(~0u, before, owner);
    return __shfl_sync(~0u, digit, owner);
  }

  // body(i, rank(i)) for the share of one of several CTAs, and a rank of 0 for lanes behind the
  // end, as those of a warp stay together
  template <class Rank, class Body>
  __device__ void each_rank(int64_t n, int member, int members, const Rank& rank,
                            const Body& body) const {
    constexpr int kAhead = 4;  // ranks of a thread that are on their way at the same time
    const int64_t step = int64_t{blockDim.x} * members, lane = threadIdx.x % 32;
    for (int64_t first = int64_t{blockDim.x} * member + threadIdx.x; first - lane < n;
         first += kAhead * step) {
      uint64_t ranks[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        // a rank that waits for a condition would be waited for before the next
        const int64_t at = first + i * step;
        const uint64_t own = rank(min(at, n - 1));
        ranks[i] = at < n ? own : 0;
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int64_t at = first + i * step;
        if (at - lane >= n) break;
        body(at, ranks[i]);
      }
    }
  }

 protected:
  // The share of one of several CTAs
  template <class Rank, class Mass>
  __device__ void tally(Histogram& bins, int64_t n, int member, int members, const Digit& digit,
                        bool by_mass, const Rank& rank, const Mass& mass) const {
    each(256, [&](int64_t i) { bins.count[i] = bins.mass[i] = 0; });
    each_rank(n, member, members, rank, [&](int64_t at, uint64_t own) {
      const bool counts = digit.has(own);
      tally_warp(bins, counts, digit.of(own), by_mass, counts && by_mass ? mass(at, own) : 0);
    });
    __syncthreads();
  }
  // The scores of a warp are often much the same: one lane adds for all that share its digit, and
  // another one if the first had most of them
  __device__ void tally_warp(Histogram& bins, bool counts, int digit, bool by_mass,
                             unsigned long long mass) const {
    const int lane = threadIdx.x % 32;
    for (int turn = 0; turn < 2; ++turn) {
      const uint32_t here = __ballot_sync(~0u, counts);
      if (here == 0) return;
      const int leader = __ffs(static_cast<int>(here)) - 1;
      const bool same = digit == __shfl_sync(~0u, digit, leader) && counts;
      const uint32_t peers = __ballot_sync(~0u, same);
      unsigned long long sum = 0;
      if (by_mass) {
        // Masses are below 2^42: 32 halves of one don't overflow
        const auto total = [&](unsigned long long part) -> unsigned long long {
          return __reduce_add_sync(~0u, same ? static_cast<uint32_t>(part) : 0u);
        };
        sum = (total(mass >> 21) << 21) + total(mass & 0x1fffff);
      }
      if (lane == leader) add_bin(bins, digit, static_cast<uint32_t>(__popc(peers)), sum);
      counts &= !same;
      if (2 * __popc(peers) < __popc(here)) break;
    }
    if (counts) add_bin(bins, digit, 1, mass);
  }
  // Shared memory adds 32 bits at once, but not 64: the upper half of a sum gets what the lower
  // half carries
  __device__ static void add_bin(Histogram& bins, int digit, uint32_t count,
                                 unsigned long long mass) {
    atomicAdd(reinterpret_cast<uint32_t*>(&bins.count[digit]), count);
    if (mass == 0) return;
    auto* halves = reinterpret_cast<uint32_t*>(&bins.mass[digit]);
    const auto low = static_cast<uint32_t>(mass);
    const uint32_t carry = atomicAdd(halves, low) + low < low;
    const uint32_t high = static_cast<uint32_t>(mass >> 32) + carry;
    if (high != 0) atomicAdd(halves + 1, high);
  }
  // Up to 32 words of a warp at a time: neighbouring lanes look at neighbouring bits
  template <class Bit, class Body>
  __device__ void gather(int64_t n, int member, int members, const Bit& bit,
                         const Body& body) const {
    const int64_t lane = threadIdx.x % 32, warps = blockDim.x / 32 * members;
    const int64_t each = min(int64_t{32}, (n + warps - 1) / warps);
    for (int64_t first = (blockDim.x / 32 * member + threadIdx.x / 32) * each; first < n;
         first += warps * each) {
      uint32_t word = 0;
#pragma unroll 8
      for (int64_t other = 0; other < each; ++other) {
        const int64_t at = first + other;
        const uint32_t found = __ballot_sync(~0u, at < n && bit(at, lane));
        if (lane == other) word = found;
      }
      if (lane < each && first + lane < n) body(first + lane, word);
    }
  }
};

// What CTAs that work on the same selection share; all zeros at first
struct GroupMemory {
  Histogram bins[3];
  uint32_t arrivals;
};

// Several CTAs as a team for words and counting, all of which must run at the same time. `bins` are
// each CTA's own, and complete after counting.
struct CtaGroup : CtaTeam {
  GroupMemory& memory;
  const int member, members;

  __device__ CtaGroup(GroupMemory& memory, int member, int members)
      : memory(memory), member(member), members(members) {}

  template <class Bit, class Body>
  __device__ void words(int64_t n, const Bit& bit, const Body& body) const {
    gather(n, member, members, bit, body);
    meet();
  }
  // Three sums take turns. Who adds to one has met all others since they read it last, two counts
  // before it was cleared.
  template <class Rank, class Mass>
  __device__ void count(Histogram& bins, int64_t n, const Digit& digit, bool by_mass,
                        const Rank& rank, const Mass& mass) const {
    tally(bins, n, member, members, digit, by_mass, rank, mass);
    share(bins);
  }
  // `bins`, each of a CTA, become those of all
  __device__ void share(Histogram& bins) const {
    if (members == 1) return;
    Histogram &sum = memory.bins[counts_ % 3], &next = memory.bins[(counts_ + 1) % 3];
    ++counts_;
    for (int i = static_cast<int>(threadIdx.x); i < 256; i += static_cast<int>(blockDim.x)) {
      if (bins.count[i] != 0) {
        atomicAdd(&sum.count[i], bins.count[i]);
        atomicAdd(&sum.mass[i], bins.mass[i]);
      }
      if (member == 0) next.count[i] = next.mass[i] = 0;
    }
    meet();
    for (int i = static_cast<int>(threadIdx.x); i < 256; i += static_cast<int>(blockDim.x)) {
      bins.count[i] = sum.count[i];
      bins.mass[i] = sum.mass[i];
    }
    __syncthreads();
  }
  // Until all CTAs are here, and all that they wrote before is seen
  __device__ void meet() const {
    __syncthreads();
    if (members == 1) return;
    ++meetings_;
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(&memory.arrivals, 1);
      const volatile uint32_t& arrivals = memory.arrivals;
      while (arrivals < meetings_ * static_cast<uint32_t>(members)) __nanosleep(20);
      __threadfence();
    }
    __syncthreads();
  }

 private:
  mutable uint32_t counts_ = 0, meetings_ = 0;
};

}  // namespace heddle
