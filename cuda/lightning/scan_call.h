#pragma once
#include "common/context.h"
#include "lightning/forward_sm90.h"
#include "ops/lightning.h"

namespace heddle {

inline ScanStrides scan_strides(const Tensor& x) {
  return {x.strides[0], x.strides[1], x.strides[2]};
}

// What a scan and its backward tell a Hopper kernel alike
template <class Op> ScanCall scan_call(const Op& op, const CudaContext& context) {
  const LightningHeads heads(op.q, op.k, op.v, op.slopes);
  ScanCall call{};
  call.dtype = op.q.dtype;
  call.b = op.q.shape[0];
  call.s = op.q.shape[1];
  call.d = op.q.shape[3];
  call.e = op.v.shape[3];
  call.hq = heads.q;
  call.hk = heads.k;
  call.hv = heads.v;
  call.heads = heads.out;
  call.hs = heads.states;
  call.q = op.q.data;
  call.k = op.k.data;
  call.v = op.v.data;
  call.q_strides = scan_strides(op.q);
  call.k_strides = scan_strides(op.k);
  call.v_strides = scan_strides(op.v);
  call.scale = static_cast<float>(op.scale);
  call.slopes = op.slopes.template as<float>();
  call.slopes_stride = op.slopes.strides[0];
  call.cu_seqlens = op.cu_seqlens ? op.cu_seqlens.template as<int32_t>() : nullptr;
  call.cu_stride = op.cu_seqlens.strides[0];
  call.sequences = op.cu_seqlens ? op.cu_seqlens.shape[0] - 1 : op.q.shape[0];
  call.processors = context.processors;
  return call;
}

// Before the tensors themselves are looked at; null if nothing speaks against it
template <class Op> const char* declines_scan_options(const Op& op, const CudaContext& context) {
  if (context.arch != 90) return "the GPU must be of compute capability 9.0";
  if (op.precision) return "precision must be default";
  if (op.q.strides[3] != 1 || op.k.strides[3] != 1 || op.v.strides[3] != 1)
    return "q, k and v must be contiguous along d";
  return nullptr;
}

inline void set_initial_state(ScanCall& call, const Tensor& state) {
  call.initial_state = state ? state.as<float>() : nullptr;
  std::copy_n(state.strides, 4, call.initial_strides);
}

}  // namespace heddle
