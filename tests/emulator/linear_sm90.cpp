// The Hopper matrix product on the emulator, against float64
#include "linear/linear_sm90.cuh"

#include <cmath>
#include <vector>

namespace heddle {
namespace {

#ifndef HEDDLE_DTYPE
#define HEDDLE_DTYPE kBF16
#endif
constexpr DType kType = DType::HEDDLE_DTYPE;

struct Case {
  int64_t rows, inputs, outputs;
  bool bias, f32_out;
  int processors;
};

struct Matrix {
  Matrix(int64_t rows, int64_t columns, int64_t gap)
      : row(columns + gap), bits(static_cast<size_t>(rows * row + 16), 0x7fff) {
    while (reinterpret_cast<uintptr_t>(bits.data() + shift) % 16 != 0) ++shift;
  }
  uint16_t* data() { return bits.data() + shift; }
  float value(int64_t r, int64_t c) { return emulator::decode(kType, data()[r * row + c]); }

  int64_t row;
  std::vector<uint16_t> bits;
  size_t shift = 0;
};

double check(const Case& c, emulator::Random& random) {
  Matrix x(c.rows, c.inputs, 8), weight(c.outputs, c.inputs, 0), bias(1, c.outputs, 0);
  const auto draw = [&](Matrix& to, int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < columns; ++i)
        to.data()[r * to.row + i] =
            emulator::encode(kType, static_cast<float>(random.below(4096)) / 1024.f - 2);
  };
  draw(x, c.rows, c.inputs);
  draw(weight, c.outputs, c.inputs);
  draw(bias, 1, c.outputs);
  const auto size = static_cast<size_t>(c.rows * c.outputs);
  std::vector<float> wide(size + 1, NAN);
  std::vector<uint16_t> narrow(size + 2, 0x7fff);
  LinearCall call{};
  call.dtype = kType;
  call.out_dtype = c.f32_out ? DType::kF32 : kType;
  call.rows = c.rows;
  call.inputs = c.inputs;
  call.outputs = c.outputs;
  call.x = x.data();
  call.weight = weight.data();
  call.bias = c.bias ? bias.data() : nullptr;
  call.out = c.f32_out ? static_cast<void*>(wide.data()) : narrow.data();
  call.x_row = x.row;
  call.weight_row = weight.row;
  call.bias_stride = 1;
  call.processors = c.processors;
  launch_linear_sm90<kType>(call, nullptr);

  const double unit = c.f32_out ? 0x1p-20 : kType == DType::kBF16 ? 0x1p-8 : 0x1p-11;
  double worst = 0;
  for (int64_t r = 0; r < c.rows; ++r)
    for (int64_t o = 0; o < c.outputs; ++o) {
      double sum = c.bias ? bias.value(0, o) : 0, terms = std::fabs(sum);
      for (int64_t i = 0; i < c.inputs; ++i) {
        const double term = double{x.value(r, i)} * weight.value(o, i);
        sum += term;
        terms += std::fabs(term);
      }
      const auto at = static_cast<size_t>(r * c.outputs + o);
      const double actual = c.f32_out ? wide[at] : emulator::decode(kType, narrow[at]);
      const double error =
          std::fabs(actual - sum) / (unit * std::fabs(sum) + 0x1p-20 * terms + 1e-6);
      worst = error <= worst ? worst : std::isnan(error) ? INFINITY : error;
    }
  if (!std::isnan(wide[size]) || narrow[size] != 0x7fff) worst = INFINITY;
  return worst;
}

constexpr Case kCases[] = {
    {1, 8, 1, false, false, 1},      {129, 72, 130, true, false, 2},
    {130, 520, 257, false, true, 1}, {7, 200, 515, true, true, 2},
    {257, 64, 64, false, false, 3},  {1100, 24, 140, true, false, 4},
    {64, 1000, 96, false, false, 1},
};

}  // namespace
}  // namespace heddle

int main(int argc, char** argv) {
  using namespace heddle;
  return emulator::run_cases(kCases, argc, argv, check);
}
