#pragma once
#include <cstdint>

#include "common/launch.h"
#include "core/dtype.h"

namespace heddle {

struct LinearCall {
  DType dtype;      // of x, weight and bias
  DType out_dtype;  // the same or f32
  int64_t rows, inputs, outputs;
  const void *x, *weight, *bias;  // [rows, inputs], [outputs, inputs], [outputs] or null
  void* out;                      // [rows, outputs], contiguous
  int64_t x_row, weight_row, bias_stride;
  int processors;  // multiprocessors, each of which runs one CTA
};

// x weight^T + bias on Hopper's matrix instructions, for calls that are not declined
void linear_sm90(const LinearCall& call, cudaStream_t stream);

// Why it cannot take a call, or null
const char* declines_linear_sm90(const LinearCall& call);

// What linear_sm90 picks from
template <DType kType> void launch_linear_sm90(const LinearCall& call, cudaStream_t stream);

}  // namespace heddle
