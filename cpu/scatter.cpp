#include "ops/scatter.h"

#include <algorithm>

#include "core/cpu_context.h"
#include "core/registry.h"

namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {
namespace {

template <class T> void move_rows(const Scatter& op, int64_t first, int64_t last) {
  const int64_t width = op.to.shape[2], stride = op.from.strides[1];
  for (int64_t i = first; i < last; ++i) {
    const int64_t index = op.index(i);
    if (index < 0) continue;
    T* to = op.to.as<T>() + op.begin(index);
    const T* from = op.from.as<T>() + i * op.from.strides[0];
    if (op.to.strides[2] == 1 && stride == 1) {
      std::copy_n(from, width, to);
    } else {
      for (int64_t e = 0; e < width; ++e) to[e * op.to.strides[2]] = from[e * stride];
    }
  }
}

void run(const Scatter& op, CpuContext& context) {
  const int64_t n = op.indices.size(), width = op.to.shape[2];
  for (int64_t i = 0; i < n; ++i)
    HEDDLE_CHECK(op.index(i) < op.rows(), kArgument, "indices", "indices must be below ", op.rows(),
                 ", the rows there are, got ", op.index(i));
  if (n * width == 0) return;
  const int64_t pieces =
      std::clamp<int64_t>(n * width / 32768, 1, std::min<int64_t>(n, 4 * context.threads()));
  context.parallel(pieces, [&](int64_t piece, int) {
    const int64_t first = n * piece / pieces, last = n * (piece + 1) / pieces;
    switch (size_of(op.to.dtype)) {
      case 1:
        return move_rows<uint8_t>(op, first, last);
      case 2:
        return move_rows<uint16_t>(op, first, last);
      case 4:
        return move_rows<uint32_t>(op, first, last);
      default:
        return move_rows<uint64_t>(op, first, last);
    }
  });
}

HEDDLE_REGISTER(Scatter);

}  // namespace
}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
