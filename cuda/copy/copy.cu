#include "ops/copy.h"

#include "common/convert.cuh"
#include "core/slot.h"

namespace heddle {
namespace {

template <class Bits> __global__ void copy_kernel(Strided x, Strided to, int64_t count) {
  HEDDLE_EACH(i, count) to.at<Bits>(i) = x.at<Bits>(i);
}

template <class T, class S>
__global__ void copy_convert_kernel(Strided x, Strided to, int64_t count) {
  HEDDLE_EACH(i, count) to.at<T>(i) = from_float<T>(to_float(x.at<S>(i)));
}

__global__ void copy_any_kernel(Strided x, DType from, int64_t from_size, Strided to, DType into,
                                int64_t into_size, int64_t count) {
  HEDDLE_EACH(i, count) {
    const char* source = x.data + x.offset(i) * from_size;
    char* target = to.data + to.offset(i) * into_size;
    if (is_integer(from)) {
      store_integer(target, into, load_integer(source, from));
    } else {
      store_double(target, into, load_double(source, from));
    }
  }
}

void run(const Copy& op, CudaContext& context) {
  const int64_t count = op.x.size();
  if (count == 0) return;
  const Strided x(op.x), to(op.to);
  const auto from_size = static_cast<int64_t>(size_of(op.x.dtype));
  if (op.x.dtype == op.to.dtype && x.contiguous && to.contiguous) {
    HEDDLE_CUDA(cudaMemcpyAsync(to.data, x.data, static_cast<size_t>(count * from_size),
                                cudaMemcpyDeviceToDevice, context.stream));
    return;
  }
  const unsigned blocks = blocks_for(count, context);
  const auto launch = [&](auto kernel) {
    kernel<<<blocks, kThreads, 0, context.stream>>>(x, to, count);
  };
  if (op.x.dtype == op.to.dtype) {
    dispatch_size(size_of(op.x.dtype), [&]<class Bits>(Bits) { launch(copy_kernel<Bits>); });
  } else if (kFloats.has(op.x.dtype) && kFloats.has(op.to.dtype)) {
    dispatch_float(op.x.dtype, [&]<class S>(S) {
      dispatch_float(op.to.dtype, [&]<class T>(T) { launch(copy_convert_kernel<T, S>); });
    });
  } else {
    copy_any_kernel<<<blocks, kThreads, 0, context.stream>>>(
        x, op.x.dtype, from_size, to, op.to.dtype, static_cast<int64_t>(size_of(op.to.dtype)),
        count);
  }
  context.launched("copy_kernel");
}

HEDDLE_REGISTER(Copy);

}  // namespace
}  // namespace heddle
