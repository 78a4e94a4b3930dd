#include "common/tensor_map.h"

#include <cudaTypedefs.h>

#include "common/check.h"
#include "core/error.h"

namespace heddle {
namespace {

// libcuda's encoder, found at run time so that nothing links against libcuda
PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    HEDDLE_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                 cudaEnableDefault, &found));
    HEDDLE_CHECK(found == cudaDriverEntryPointSuccess && entry, kCuda, "",
                 "the driver has no cuTensorMapEncodeTiled; update it to one for CUDA 12 or newer");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
  }();
  return encoder;
}

}  // namespace

CUtensorMap make_tensor_map(DType dtype, const void* data, const TensorMapShape& shape, int rows) {
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(shape.d), static_cast<cuuint64_t>(shape.s),
                               static_cast<cuuint64_t>(shape.h), static_cast<cuuint64_t>(shape.b)};
  // a stride along a dimension of size one can be anything, but the encoder reads it
  const auto bytes = [&](int64_t size, int64_t stride) {
    return static_cast<cuuint64_t>(size == 1 ? (shape.d + 7) / 8 * 8 : stride) * 2;
  };
  const cuuint64_t strides[3] = {bytes(shape.s, shape.row_stride),
                                 bytes(shape.h, shape.head_stride),
                                 bytes(shape.b, shape.batch_stride)};
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  const auto type = dtype == DType::kF16    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                    : dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                            : CU_TENSOR_MAP_DATA_TYPE_UINT16;
  CUtensorMap map;
  const CUresult result =
      tensor_map_encoder()(&map, type, 4, const_cast<void*>(data), sizes, strides, box, steps,
                           CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  HEDDLE_CHECK(result == CUDA_SUCCESS, kCuda, "", "cuTensorMapEncodeTiled failed with ",
               static_cast<int>(result));
  return map;
}

}  // namespace heddle
