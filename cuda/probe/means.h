#pragma once
#include "core/host_device.h"
#include "core/tensor.h"

namespace heddle {

// Blocks of rows of x, and where their means go: [b, heads, blocks, depth] with zeros from d on
struct MeanArgs {
  struct Block {
    int64_t from, rows, to;  // element of x, and of the means
  };
  Tensor x;
  int64_t block = 1, depth = 0;
  float* mean = nullptr;

  HEDDLE_HD int64_t blocks() const { return (x.shape[1] + block - 1) / block; }
  HEDDLE_HD int64_t count() const { return x.shape[0] * x.shape[2] * blocks(); }
  // One of all, heads side by side as they are in memory
  HEDDLE_HD Block at(uint32_t number) const {
    const auto heads = static_cast<uint32_t>(x.shape[2]), all = static_cast<uint32_t>(blocks());
    const uint32_t head = number % heads, index = number / heads % all, b = number / heads / all;
    const int64_t first = index * block, rest = x.shape[1] - first;
    return {b * x.strides[0] + first * x.strides[1] + head * x.strides[2],
            rest < block ? rest : block, ((int64_t{b} * heads + head) * all + index) * depth};
  }
};

}  // namespace heddle
