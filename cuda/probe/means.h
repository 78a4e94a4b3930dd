#pragma once
#include <cstdint>

#include "core/host_device.h"
#include "core/tensor.h"

namespace heddle {

constexpr int kMeanPlanes = 3;
// Means that somebody waits for are counted by so many of a head
constexpr int kReadyBlocks = 128;

// Blocks of rows of x, and where their means go: [b, heads, blocks, depth] with zeros from d on
struct MeanArgs {
  struct Block {
    int b, head;
    int64_t first, rows, to;  // rows of x, and element of the means
  };
  Tensor x;
  int64_t block = 1, depth = 0;
  float* mean = nullptr;
  uint16_t* planes = nullptr;  // instead, three numbers of bf16 that add up to each, or nearly
  int64_t apart = 0;           // elements from one to the next

  HEDDLE_HD int64_t blocks() const { return (x.shape[1] + block - 1) / block; }
  HEDDLE_HD int64_t count() const { return x.shape[0] * x.shape[2] * blocks(); }
  // One of all, heads side by side as they are in memory
  HEDDLE_HD Block at(uint32_t number) const {
    const auto heads = static_cast<uint32_t>(x.shape[2]), all = static_cast<uint32_t>(blocks());
    const uint32_t head = number % heads, index = number / heads % all, b = number / heads / all;
    const int64_t first = index * block, rest = x.shape[1] - first;
    return {static_cast<int>(b), static_cast<int>(head), first, rest < block ? rest : block,
            ((int64_t{b} * heads + head) * all + index) * depth};
  }
};

}  // namespace heddle
