#pragma once
#include <algorithm>
#include <vector>

#include "core/tensor.h"
#include "emulator.h"
#include "variant.h"

namespace heddle {

// [b, s, h, d], rows of all heads after each other, behind something that is no number
struct Rows {
  Rows(int64_t b, int64_t s, int64_t h, emulator::Random& random, double slope = 0,
       double offset = 0)
      : bits(static_cast<size_t>((b + 1) * (s + 1) * h * kD), 0x7fff) {
    Tensor& x = tensor;
    x.rank = 4;
    x.dtype = kType;
    const int64_t shape[] = {b, s, h, kD}, strides[] = {(s + 1) * h * kD, h * kD, kD, 1};
    std::copy_n(shape, 4, x.shape);
    std::copy_n(strides, 4, x.strides);
    size_t shift = 0;
    while (reinterpret_cast<uintptr_t>(&bits[shift]) % 16 != 0) ++shift;
    x.data = &bits[shift + static_cast<size_t>(h * kD)];
    for (int64_t i = 0; i < b; ++i)
      for (int64_t r = 0; r < s; ++r) {
        const double size = 1 + slope * ((slope < 0 ? r - s : r) / static_cast<double>(s));
        for (int64_t e = 0; e < h * kD; ++e)
          x.as<uint16_t>()[i * x.strides[0] + r * x.strides[1] + e] = emulator::encode(
              kType, static_cast<float>(offset + size * (random.below(4096) / 2048. - 1)));
      }
  }
  double value(int64_t b, int64_t s, int64_t h, int64_t e) const {
    const Tensor& x = tensor;
    return emulator::decode(
        kType, x.as<uint16_t>()[b * x.strides[0] + s * x.strides[1] + h * x.strides[2] + e]);
  }

  std::vector<uint16_t> bits;
  Tensor tensor;
};

}  // namespace heddle
