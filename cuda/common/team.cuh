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
  __device__ void wait() const { __syncthreads(); }
};

}  // namespace heddle
