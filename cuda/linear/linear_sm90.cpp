#include "linear/linear_sm90.h"

namespace heddle {

const char* declines_linear_sm90(const LinearCall& call) {
  constexpr int64_t kMost = int64_t{1} << 30;  // rows and tiles are counted in 32 bits
  if (call.dtype != DType::kF16 && call.dtype != DType::kBF16)
    return "dtype must be float16 or bfloat16";
  if (call.out_dtype != call.dtype && call.out_dtype != DType::kF32)
    return "out must have the dtype of x or float32";
  if (call.inputs == 0 || call.inputs > kMost) return "x must have from 1 to 2^30 columns";
  if (call.rows > kMost || call.outputs > kMost / (call.rows / 128 + 1))
    return "out must have at most 2^30 rows and tiles";
  const auto addressable = [](const void* data, int64_t rows, int64_t stride) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
           (rows == 1 || (stride > 0 && stride % 8 == 0 && stride < int64_t{1} << 39));
  };
  if (call.inputs % 8 != 0 || !addressable(call.x, call.rows, call.x_row) ||
      !addressable(call.weight, call.outputs, call.weight_row))
    return "x and weight must start at a multiple of 16 bytes, rows must be multiples of 8";
  return nullptr;
}

void linear_sm90(const LinearCall& call, cudaStream_t stream) {
  call.dtype == DType::kF16 ? launch_linear_sm90<DType::kF16>(call, stream)
                            : launch_linear_sm90<DType::kBF16>(call, stream);
}

}  // namespace heddle
