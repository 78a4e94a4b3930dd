#include "ops/embed.h"

#include "common/elements.cuh"
#include "core/slot.h"

namespace heddle {
namespace {

template <class T>
__global__ void embed_kernel(Strided ids, DType dtype, const T* table, int64_t row_stride,
                             int64_t stride, T* out, int64_t count, int64_t vocabulary, int64_t d,
                             int* fault) {
  HEDDLE_EACH(index, count * d) {
    const int64_t i = index / d, column = index % d;
    const int64_t id = dtype == DType::kI64   ? ids.at<int64_t>(i)
                       : dtype == DType::kI32 ? ids.at<int32_t>(i)
                                              : ids.at<uint8_t>(i);
    if (id < 0 || id >= vocabulary) {
      *fault = 1;
    } else {
      out[index] = table[id * row_stride + column * stride];
    }
  }
}

void run(const Embed& op, CudaContext& context) {
  const int64_t count = op.ids.size(), d = op.table.shape[1];
  if (count * d == 0) return;
  int* fault = context.fault("ids must be inside the table");
  dispatch_float(op.table.dtype, [&]<class T>(T) {
    embed_kernel<T><<<blocks_for(count * d, context), kThreads, 0, context.stream>>>(
        Strided(op.ids), op.ids.dtype, op.table.as<T>(), op.table.strides[0], op.table.strides[1],
        op.out.as<T>(), count, op.table.shape[0], d, fault);
  });
  context.launched("embed_kernel");
}

HEDDLE_REGISTER(Embed);

}  // namespace
}  // namespace heddle
