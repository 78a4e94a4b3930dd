#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

#include "emulator.h"
#include "lightning/forward_sm90.h"

// What the programs of lightning attention have in common
namespace heddle {

inline float normal(emulator::Random& random) {
  float sum = 0;
  for (int i = 0; i < 12; ++i) sum += static_cast<float>(random.below(1 << 16)) / 65536.f;
  return sum - 6;
}

// A [b, s, h, d] tensor, with `gaps` one more token and head than the kernel may touch, all NaN
struct Array {
  struct Shape {
    int64_t b, s, h, d;
  };
  Array(DType type, Shape shape, bool gaps)
      : type(type),
        shape(shape),
        strides{(shape.s + gaps) * (shape.h + gaps) * shape.d, (shape.h + gaps) * shape.d, shape.d},
        bits(static_cast<size_t>(shape.b * strides.batch + 8 + strides.row), 0x7fff) {
    while (reinterpret_cast<uintptr_t>(bits.data() + shift) % 16 != 0) ++shift;
  }
  uint16_t& at(int64_t b, int64_t s, int64_t h, int64_t i) {
    return data()[b * strides.batch + s * strides.row + h * strides.head + i];
  }
  double value(int64_t b, int64_t s, int64_t h, int64_t i) {
    return emulator::decode(type, at(b, s, h, i));
  }
  uint16_t* data() { return bits.data() + shift; }
  void draw(emulator::Random& random, float scale) {
    for (int64_t b = 0; b < shape.b; ++b)
      for (int64_t t = 0; t < shape.s; ++t)
        for (int64_t j = 0; j < shape.h; ++j)
          for (int64_t i = 0; i < shape.d; ++i)
            at(b, t, j, i) = emulator::encode(type, scale * normal(random));
  }
  bool untouched_behind() const {
    for (auto i = shift + static_cast<size_t>(shape.b * strides.batch); i < bits.size(); ++i)
      if (bits[i] != 0x7fff) return false;
    return true;
  }

  DType type;
  Shape shape;
  ScanStrides strides;
  std::vector<uint16_t> bits;
  size_t shift = 0;
};

// √(Σ(x - y)² / Σ y²); NaN and infinities stay
struct Error {
  double difference = 0, norm = 0;
  void add(double actual, double expected) {
    difference += (actual - expected) * (actual - expected);
    norm += expected * expected;
  }
  double relative() const {
    const double error = std::sqrt(difference / std::max(norm, 1e-300));
    return std::isnan(error) ? INFINITY : error;
  }
};

// `slow`: states reach from one segment into the next
inline float draw_slope(emulator::Random& random, bool slow) {
  constexpr float kSlopes[] = {0.f, 0.004f, 0.1f, 0.9f, 8.f, 200.f};
  return slow ? kSlopes[1 + random.below(2)] : kSlopes[random.below(6)];
}

}  // namespace heddle
