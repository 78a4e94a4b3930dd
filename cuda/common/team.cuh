#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "core/select.h"

namespace heddle {

// The threads of a CTA as a team, for what core/select.h writes for teams. What they add to is
// shared memory or the CTA's own.
struct CtaTeam {
  template <class Body> __device__ void each(int64_t n, const Body& body) const {
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) body(i);
    __syncthreads();
  }
  __device__ void add(unsigned long long& x, unsigned long long y) const { atomicAdd(&x, y); }
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
    Wanted rest{wanted.by_mass, wanted.amount - (amounts - amount)};
    unsigned long long before = counts - count;
    int digit = 0;
    const int owner = __ffs(static_cast<int>(reached)) - 1;
    if (lane == owner) digit = crossing_of(bins, top, top - kBins + 1, rest, before);
    wanted.amount = __shfl_sync(~0u, rest.amount, owner);
    above += __shfl_sync(~0u, before, owner);
    return __shfl_sync(~0u, digit, owner);
  }
};

}  // namespace heddle
