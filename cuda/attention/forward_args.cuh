#pragma once
#include <cuda_runtime.h>

#include "attention/head_scales.h"
#include "ops/attention.h"

// What kernels of attention for any GPU take
namespace heddle {

// A tensor [b, s, h, d]
struct Heads {
  const void* data = nullptr;
  int64_t batch = 0, token = 0, head = 0, element = 0;
  Heads() = default;
  explicit Heads(const Tensor& x)
      : data(x.data),
        batch(x.strides[0]),
        token(x.strides[1]),
        head(x.strides[2]),
        element(x.strides[3]) {}
};

struct ForwardArgs {
  Heads q, k, v;
  const int32_t *cu_seqlens_q, *cu_seqlens_k, *block_table, *cache_seqlens;
  int64_t cu_q_stride, cu_k_stride, table_row, table_column, cache_stride;
  const float *slopes, *sink;
  int64_t slopes_stride, sink_stride;
  void* out;                              // [b, sq, hq, dv]
  float* lse;                             // [b, hq, sq]
  float *part_out, *part_max, *part_sum;  // of each split, unnormalised; null without splits
  int64_t b, sq, sk, hq, hk, sequences, pages, page_size, window;
  int d, dv, splits;
  const void* bias;  // null for none; of bias_dtype, with strides of 0 where it is broadcast
  int64_t bias_strides[4];
  DType bias_dtype;
  const float* level;  // null but for weights of reweighted
  int64_t level_strides[3];
  float scale, soft_cap, length_scale, power, offset;
  int weights;
  bool causal, masked, normalise, shifted, cosine;
  MaskView mask;
  int* fault;
  HeadScales scales;  // of float8
  DType out_dtype;
  const int* only_if;  // nothing is done if this word is 0; or null

  // How many lengths cache_seqlens has, and rows the table
  HEDDLE_HD int64_t caches() const { return cu_seqlens_q ? sequences : b; }
};

__device__ inline int64_t clamp_to(int64_t x, int64_t least, int64_t most) {
  return min(max(x, least), most);
}

}  // namespace heddle
