#pragma once
#include <cuda.h>

#include <cstdint>

#include "core/dtype.h"

namespace heddle {

// What the copy engine is told about a [b, s, h, d] tensor of 16-bit elements, or of pairs of 8-bit
// ones
struct TensorMapShape {
  int64_t d, s, h, b;
  int64_t row_stride, head_stride, batch_stride;  // multiples of 8
};

// Copies move boxes of `rows` rows of one head by 64 columns and swizzle them by 128 bytes. `data`
// is aligned to 16 bytes.
CUtensorMap make_tensor_map(DType dtype, const void* data, const TensorMapShape& shape, int rows);

}  // namespace heddle
