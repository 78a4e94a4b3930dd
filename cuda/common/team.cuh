#pragma once
#include <cuda_runtime.h>

#include <cstdint>

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
};

}  // namespace heddle
