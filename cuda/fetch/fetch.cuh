#pragma once
#include "common/team.cuh"
#include "core/fetch.h"

// Slots for pages by one CTA, as there are few of them, and the copies by all that fit
namespace heddle {

struct FetchTeam : CtaTeam {
  __device__ unsigned long long take(unsigned long long& x) const { return atomicAdd(&x, 1ull); }
  __device__ bool swap(int32_t& x, int32_t from, int32_t to) const {
    return atomicCAS(&x, from, to) == from;
  }
};

__device__ inline void fetch_place(const Fetch& op, int32_t* fresh, int* fault) {
  fetch_slots(FetchTeam{}, op, fresh, [&] { *fault = 1; });
}

// Units of a page of `far` go to its slot of `near`; several are on their way at once
template <class Unit>
__device__ void fetch_copy(const Fetch& op, const int32_t* fresh, const Unit* far, Unit* near,
                           int64_t units) {
  constexpr int kAhead = 4;
  const int64_t all = op.wanted.shape[0] * units, step = int64_t{gridDim.x} * blockDim.x;
  const int32_t* wanted = static_cast<int32_t*>(op.wanted.data);
  for (int64_t first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; first < all;
       first += kAhead * step) {
    Unit held[kAhead];
    int64_t to[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t at = first + i * step, entry = at / units;
      const int64_t slot = at < all ? fresh[entry] : -1;
      to[i] = slot < 0 ? -1 : slot * units + at % units;
      if (slot >= 0) held[i] = far[wanted[entry] * units + at % units];
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (to[i] >= 0) near[to[i]] = held[i];
  }
}

}  // namespace heddle
