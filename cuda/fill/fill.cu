#include "ops/fill.h"

#include "common/convert.cuh"
#include "core/philox.h"
#include "core/slot.h"

namespace heddle {
namespace {

__global__ void fill_kernel(Strided to, DType dtype, int64_t size, int64_t count, double value) {
  HEDDLE_EACH(i, count) store_double(to.data + to.offset(i) * size, dtype, value);
}

__global__ void fill_normal_kernel(Strided to, DType dtype, int64_t size, int64_t count,
                                   uint64_t seed) {
  HEDDLE_EACH(i, count)
  store_double(to.data + to.offset(i) * size, dtype,
               standard_normal(static_cast<uint64_t>(i), seed));
}

void run(const Fill& op, CudaContext& context) {
  const int64_t count = op.to.size();
  if (count == 0) return;
  const auto size = static_cast<int64_t>(size_of(op.to.dtype));
  const Strided to(op.to);
  const unsigned blocks = blocks_for(count, context);
  if (op.source == 0) {
    fill_kernel<<<blocks, kThreads, 0, context.stream>>>(to, op.to.dtype, size, count, op.value);
  } else {
    fill_normal_kernel<<<blocks, kThreads, 0, context.stream>>>(to, op.to.dtype, size, count,
                                                                static_cast<uint64_t>(op.seed));
  }
  context.launched("fill_kernel");
}

HEDDLE_REGISTER(Fill);

}  // namespace
}  // namespace heddle
