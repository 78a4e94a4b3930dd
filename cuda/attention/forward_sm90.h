#pragma once
#include <cstdint>

#include "common/launch.h"
#include "core/dtype.h"

namespace heddle {

// Elements from one batch, row and head of a [b, s, h, d] tensor to the next; d is contiguous
struct Strides {
  int64_t batch, row, head;
};

struct ForwardCall {
  DType dtype;
  int64_t b, sq, sk, hq, hk, d, dv;
  const void *q, *k, *v;  // [b, sq, hq, d], [b, sk, hk, d], [b, sk, hk, dv]
  void* out;              // [b, sq, hq, dv]
  float* lse;             // [b, hq, sq], contiguous
  Strides q_strides, k_strides, v_strides, out_strides;
  float scale;
  bool causal;
  int processors;  // multiprocessors, each of which runs one CTA
};

// Dense or causal attention on Hopper's matrix instructions, for calls that are not declined
void forward_sm90(const ForwardCall& call, cudaStream_t stream);

// Why it cannot take a call, or null
const char* declines_forward_sm90(const ForwardCall& call);

// What forward_sm90 picks from, one instantiation file each
template <DType kType, int kHeadDim>
void launch_forward_sm90(const ForwardCall& call, cudaStream_t stream);

}  // namespace heddle
