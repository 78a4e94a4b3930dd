#pragma once
#include <algorithm>

#include "core/cpu_context.h"
#include "core/tensor.h"
#include "cpu/half.h"

// Walking over tensors of any strides, row by row: a row is the last dimension.
namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {

// Work below this many elements is not worth waking other threads
inline constexpr int64_t kWorthSharing = 16384;

struct Rows {
  explicit Rows(const Tensor& tensor)
      : length(tensor.rank ? tensor.shape[tensor.rank - 1] : 1),
        count(length ? tensor.size() / length : 0) {}
  int64_t length, count;

  // Where a row of a tensor of the same shape begins, in elements
  static int64_t offset(const Tensor& tensor, int64_t row) {
    int64_t offset = 0;
    for (int i = tensor.rank - 2; i >= 0; --i) {
      offset += row % tensor.shape[i] * tensor.strides[i];
      row /= tensor.shape[i];
    }
    return offset;
  }
  static int64_t stride(const Tensor& tensor) {
    return tensor.rank ? tensor.strides[tensor.rank - 1] : 1;
  }
};

// Calls body(first, last) for runs of rows, on several threads when there is enough to do
template <class Body>
inline void for_rows(const Rows& rows, const CpuContext& context, const Body& body) {
  const int64_t total = rows.count * std::max<int64_t>(rows.length, 1);
  const int64_t pieces = std::clamp<int64_t>(total / kWorthSharing, 1,
                                             std::min<int64_t>(rows.count, 4 * context.threads()));
  if (rows.count == 0) return;
  context.parallel(pieces, [&](int64_t piece, int) {
    body(rows.count * piece / pieces, rows.count * (piece + 1) / pieces);
  });
}

}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
