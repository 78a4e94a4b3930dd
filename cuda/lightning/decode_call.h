#pragma once
#include <cuda_runtime.h>

#include "core/dtype.h"
#include "lightning/bad_slope.cuh"

namespace heddle {

// Rows of q, k or v: [b, s, heads, d or e]
struct DecodeRows {
  const void* data;
  int64_t strides[4];

  __device__ int64_t offset(int64_t b, int64_t token, int64_t head, int64_t i) const {
    return b * strides[0] + token * strides[1] + head * strides[2] + i * strides[3];
  }
};

// A call of lightning.decode as kernels take it
struct DecodeCall {
  DType dtype;  // of q, k, v and out
  DecodeRows q, k, v;
  const float* slopes;
  int64_t slopes_stride;
  float* states;
  const int32_t* slots;
  int64_t slots_stride, batch, pool;
  void* out;
  float* all_states;
  int heads_q, heads_k, heads_v, heads, heads_state, tokens, d, e;
  float scale;
  bool transposed;  // states are [e, d]
  bool vectors;     // rows of a state are aligned to 16 bytes
  int* fault;
  int processors;

  __device__ int64_t state_size() const { return static_cast<int64_t>(d) * e; }
  // Whether this thread finds a slot or a slope that is none. Threads together look at everything,
  // so that nobody has to clear the word before.
  __device__ bool finds_bad(int thread, int threads) const {
    bool bad = false;
    for (int64_t i = thread; i < batch; i += threads) bad |= slots[i * slots_stride] >= pool;
    for (int i = thread; i < heads_state; i += threads) bad |= bad_slope(slopes[i * slopes_stride]);
    return bad;
  }
};

}  // namespace heddle
