#pragma once
#include <algorithm>

#include "lightning/forward_sm90.h"

namespace heddle {

// The walk backward in time that gives dk, dv and the gradient of the initial state. Of the scan's
// call, initial_state is dstate, and state the gradient that each head has: [sequences, heads, d,
// e]
struct SweepCall : ScanCall {
  const void* dout;  // [b, s, heads, e]
  ScanStrides dout_strides;
  // [b, s, heads, d] and [b, s, heads, e], contiguous: f32 if heads share keys and are still to be
  // added up, else of the call's dtype
  void *dk, *dv;
};
ScanPlan plan_sweep_sm90(const SweepCall& call);

// dq is a scan with dout, v and k in the roles of q, k and v and with a transposed state
inline ScanCall scan_for_dq(const SweepCall& call, const float* initial_state,
                            const int64_t* initial_strides, void* dq) {
  ScanCall scan = call;
  scan.d = call.e;
  scan.e = call.d;
  scan.hq = call.heads;
  scan.hk = call.hv;
  scan.hv = call.hk;
  scan.q = call.dout;
  scan.k = call.v;
  scan.v = call.k;
  scan.q_strides = call.dout_strides;
  scan.k_strides = call.v_strides;
  scan.v_strides = call.k_strides;
  scan.out = dq;
  scan.initial_state = initial_state;
  const int64_t turned[4] = {initial_strides[0], initial_strides[1], initial_strides[3],
                             initial_strides[2]};
  std::copy_n(turned, 4, scan.initial_strides);
  scan.state = nullptr;
  return scan;
}

// For calls that are not declined. It may begin before the kernel before has ended, which has to be
// one of scan_sm90's: dq is made beside it where that leaves multiprocessors idle.
void sweep_sm90(const SweepCall& call, const ScanPlan& plan, cudaStream_t stream);

// Why it cannot take a call, or null, beside what scan_sm90 declines
const char* declines_sweep_sm90(const ScanCall& call);

// What sweep_sm90 picks from, an instantiation file for each size: d and e up to kSize
template <DType kType, int kSize>
void launch_sweep_sm90(const SweepCall& call, const ScanPlan& plan, cudaStream_t stream);

}  // namespace heddle
