#pragma once
#include "core/dtype.h"
#include "emulator.h"

namespace heddle {

struct TensorMapShape {
  int64_t d, s, h, b;
  int64_t row_stride, head_stride, batch_stride;
};

inline emulator::TensorMap make_tensor_map(DType, const void* data, const TensorMapShape& shape,
                                           int rows) {
  // what the driver refuses
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0) emulator::fault("a tensor map off 16 bytes");
  if (rows < 1 || rows > 256) emulator::fault("a box has at most 256 rows");
  if ((shape.s > 1 && shape.row_stride % 8) || (shape.h > 1 && shape.head_stride % 8) ||
      (shape.b > 1 && shape.batch_stride % 8))
    emulator::fault("strides of a tensor map are multiples of 16 bytes");
  return {static_cast<uint16_t*>(const_cast<void*>(data)),
          shape.d,
          shape.s,
          shape.h,
          shape.b,
          shape.row_stride,
          shape.head_stride,
          shape.batch_stride,
          rows};
}

}  // namespace heddle
