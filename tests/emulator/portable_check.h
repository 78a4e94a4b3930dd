#pragma once
#include "attention/forward_portable.cuh"
#include "attention_check.h"

// What a call is to kernels of attention for any GPU, as portable_args has it
namespace heddle {

inline Heads heads_of(const void* data, const Strides& strides) {
  Heads heads;
  heads.data = data;
  heads.batch = strides.batch;
  heads.token = strides.row;
  heads.head = strides.head;
  heads.element = 1;
  return heads;
}

inline ForwardArgs args_of(const ForwardCall& call) {
  const Slots& slots = call.slots;
  ForwardArgs args{};
  args.q = heads_of(call.q, call.q_strides);
  args.k = heads_of(call.k, call.k_strides);
  args.v = heads_of(call.v, call.v_strides);
  args.cu_seqlens_q = call.cu_seqlens_q;
  args.cu_seqlens_k = call.cu_seqlens_k;
  args.cache_seqlens = call.cache_seqlens;
  args.cu_q_stride = call.cu_q_stride;
  args.cu_k_stride = call.cu_k_stride;
  args.cache_stride = call.cache_stride;
  args.slopes = call.slopes;
  args.sink = call.sink;
  args.slopes_stride = call.slopes_stride;
  args.sink_stride = call.sink_stride;
  args.b = call.b;
  args.sq = call.sq;
  args.sk = call.sk;
  args.hq = call.hq;
  args.hk = call.hk;
  args.sequences = call.sequences;
  args.page_size = 1;
  args.window = call.window;
  args.d = static_cast<int>(call.d);
  args.dv = static_cast<int>(call.dv);
  args.bias = slots.bias_form == BiasForm::kNone ? nullptr : slots.bias;
  std::copy_n(slots.bias_strides, 3, args.bias_strides);
  args.bias_strides[3] = slots.bias_form != BiasForm::kRow;
  args.bias_dtype = slots.bias_dtype;
  args.level = slots.level;
  std::copy_n(slots.level_strides, 3, args.level_strides);
  args.scale = call.scale;
  args.soft_cap = call.soft_cap;
  args.length_scale = slots.length_scale;
  args.power = slots.power;
  args.offset = slots.offset;
  args.weights = slots.weights;
  args.causal = call.causal;
  args.masked = call.masked;
  args.normalise = slots.normalise;
  args.shifted =
      slots.normalise && slots.weights != Attention::kSigmoid && slots.weights != Attention::kRelu;
  args.cosine = slots.cosine;
  args.mask = call.lists.mask;
  args.scales = call.scales;
  args.out_dtype = call.out_dtype;
  args.lse = call.lse;
  return args;
}

}  // namespace heddle
