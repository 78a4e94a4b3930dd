#pragma once
#include "core/host_device.h"
#include "core/rules.h"

namespace heddle {

// to[indices[i] / page_size, indices[i] % page_size, :] = from[i, :], no two of them the same. Rows
// of negative indices go nowhere; an index behind the last row fails the tensor.
struct Scatter {
  static constexpr const char* kName = "scatter";
  Tensor to;       // [pages, page_size, width]
  Tensor indices;  // [n] i32 or i64
  Tensor from;     // [n, width]

  template <class Schema> static void describe(Schema& schema) {
    schema.inout("to", &Scatter::to, "pages page_size width", kAny);
    schema.input("indices", &Scatter::indices, "n", DType::kI32 | DType::kI64);
    schema.input("from", &Scatter::from, "n width", like("to"));
  }

  HEDDLE_HD int64_t rows() const { return to.shape[0] * to.shape[1]; }
  HEDDLE_HD int64_t index(int64_t i) const {
    const int64_t at = i * indices.strides[0];
    return indices.dtype == DType::kI64 ? static_cast<const int64_t*>(indices.data)[at]
                                        : static_cast<const int32_t*>(indices.data)[at];
  }
  // Where a row of `to` begins, in elements
  HEDDLE_HD int64_t begin(int64_t index) const {
    return index / to.shape[1] * to.strides[0] + index % to.shape[1] * to.strides[1];
  }
};

}  // namespace heddle
