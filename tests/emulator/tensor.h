#pragma once
#include <algorithm>
#include <vector>

#include "core/tensor.h"

namespace heddle {

// A contiguous one of the CPU
inline Tensor tensor(void* data, const std::vector<int64_t>& shape) {
  Tensor made;
  made.data = data;
  made.rank = static_cast<int>(shape.size());
  std::copy(shape.begin(), shape.end(), made.shape);
  int64_t stride = 1;
  for (int i = made.rank - 1; i >= 0; stride *= made.shape[i--]) made.strides[i] = stride;
  return made;
}

}  // namespace heddle
