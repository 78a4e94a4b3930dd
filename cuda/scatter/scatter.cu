#include "ops/scatter.h"

#include <algorithm>
#include <bit>

#include "common/elements.cuh"
#include "core/slot.h"

namespace heddle {
namespace {

// Rows of `width` units, which are elements, or 16 bytes of these; `lanes` threads take one
template <class Unit>
__global__ void scatter_kernel(const __grid_constant__ Scatter op, int lanes, int* fault) {
  const int64_t thread = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  const int64_t together = gridDim.x * static_cast<int64_t>(blockDim.x) / lanes;
  for (int64_t i = thread / lanes; i < op.indices.shape[0]; i += together) {
    const int64_t index = op.index(i);
    if (index >= op.rows()) *fault = 1;
    if (index < 0 || index >= op.rows()) continue;
    Unit* to = static_cast<Unit*>(op.to.data) + op.begin(index);
    const Unit* from = static_cast<const Unit*>(op.from.data) + i * op.from.strides[0];
    for (int64_t e = thread % lanes; e < op.to.shape[2]; e += lanes)
      to[e * op.to.strides[2]] = from[e * op.from.strides[1]];
  }
}

template <class Unit> void launch(const Scatter& op, CudaContext& context) {
  const auto units = static_cast<uint64_t>(std::min<int64_t>(op.to.shape[2], 32));
  const auto lanes = static_cast<int>(std::bit_ceil(units));
  const unsigned blocks = blocks_for(op.indices.shape[0] * lanes, context);
  scatter_kernel<Unit><<<blocks, kThreads, 0, context.stream>>>(
      op, lanes, context.fault("indices must be below the number of rows"));
  context.launched("scatter_kernel");
}

void run(const Scatter& given, CudaContext& context) {
  Scatter op = given;
  if (op.from.size() == 0) return;
  const auto size = static_cast<int64_t>(size_of(op.to.dtype)), wide = 16 / size;
  const auto addresses =
      reinterpret_cast<uintptr_t>(op.to.data) | reinterpret_cast<uintptr_t>(op.from.data);
  const auto is_wide = [&](int64_t count) { return count % wide == 0; };
  if (addresses % 16 == 0 && op.to.strides[2] == 1 && op.from.strides[1] == 1 &&
      is_wide(op.to.shape[2]) && is_wide(op.to.strides[0]) && is_wide(op.to.strides[1]) &&
      is_wide(op.from.strides[0])) {
    for (int64_t* count :
         {&op.to.shape[2], &op.to.strides[0], &op.to.strides[1], &op.from.strides[0]})
      *count /= wide;
    return launch<uint4>(op, context);
  }
  dispatch_size(size_of(op.to.dtype), [&]<class T>(T) { launch<T>(op, context); });
}

HEDDLE_REGISTER(Scatter);

}  // namespace
}  // namespace heddle
