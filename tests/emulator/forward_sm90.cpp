// The Hopper forward kernel on the emulator, against its definition in float64
#include "attention/forward_sm90.cuh"

#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

namespace heddle {
namespace {

#ifndef HEDDLE_HEAD_DIM
#define HEDDLE_HEAD_DIM 64
#endif
#ifndef HEDDLE_DTYPE
#define HEDDLE_DTYPE kBF16
#endif
constexpr int kD = HEDDLE_HEAD_DIM;
constexpr DType kType = DType::HEDDLE_DTYPE;

struct Case {
  int64_t b, sq, sk, hq, hk;
  bool causal;
  int processors;
};

// One more row, head and batch than the kernel may touch, all of it NaN
struct Array {
  Array(int64_t b, int64_t s, int64_t h, int64_t gap)
      : strides{(s + 1) * (h + 1) * (kD + gap), (h + 1) * (kD + gap), kD + gap},
        bits(static_cast<size_t>(b * strides.batch + 8), 0x7fff) {
    while (reinterpret_cast<uintptr_t>(bits.data() + shift) % 16 != 0) ++shift;
  }
  uint16_t& at(int64_t b, int64_t s, int64_t h, int64_t i) {
    return data()[b * strides.batch + s * strides.row + h * strides.head + i];
  }
  float value(int64_t b, int64_t s, int64_t h, int64_t i) {
    return emulator::decode(kType, at(b, s, h, i));
  }
  uint16_t* data() { return bits.data() + shift; }

  Strides strides;
  std::vector<uint16_t> bits;
  size_t shift = 0;
};

float normal(emulator::Random& random) {
  float sum = 0;
  for (int i = 0; i < 12; ++i) sum += static_cast<float>(random.below(1 << 16)) / 65536.f;
  return sum - 6;
}

// The largest error over what is allowed, which is above 1 when the kernel is wrong
double check(const Case& c, emulator::Random& random) {
  Array q(c.b, c.sq, c.hq, 0), k(c.b, c.sk, c.hk, 8), v(c.b, c.sk, c.hk, 0),
      out(c.b, c.sq, c.hq, 0);
  const auto draw = [&](Array& to, int64_t s, int64_t h, float size) {
    for (int64_t b = 0; b < c.b; ++b)
      for (int64_t i = 0; i < s; ++i)
        for (int64_t j = 0; j < h; ++j)
          for (int64_t e = 0; e < kD; ++e)
            to.at(b, i, j, e) = emulator::encode(kType, size * normal(random));
  };
  draw(q, c.sq, c.hq, 2);
  draw(k, c.sk, c.hk, 1);
  draw(v, c.sk, c.hk, 1);
  std::vector<float> lse(static_cast<size_t>(c.b * c.hq * c.sq), NAN);
  const float scale = 1 / std::sqrt(static_cast<float>(kD));
  ForwardCall call{};
  call.dtype = kType;
  call.b = c.b;
  call.sq = c.sq;
  call.sk = c.sk;
  call.hq = c.hq;
  call.hk = c.hk;
  call.d = call.dv = kD;
  call.q = q.data();
  call.k = k.data();
  call.v = v.data();
  call.out = out.data();
  call.lse = lse.data();
  call.q_strides = q.strides;
  call.k_strides = k.strides;
  call.v_strides = v.strides;
  call.out_strides = out.strides;
  call.scale = scale;
  call.causal = c.causal;
  call.processors = c.processors;
  launch_forward_sm90<kType, kD>(call, nullptr);

  const double unit = kType == DType::kBF16 ? 0x1p-8 : 0x1p-11;
  double worst = 0;
  const auto judge = [&](double actual, double expected, double allowed) {
    const double error = actual == expected ? 0 : std::fabs(actual - expected) / allowed;
    // NaN counts as wrong
    worst = error <= worst ? worst : std::isnan(error) ? INFINITY : error;
  };
  for (int64_t b = 0; b < c.b; ++b)
    for (int64_t h = 0; h < c.hq; ++h)
      for (int64_t i = 0; i < c.sq; ++i) {
        const int64_t seen = c.causal ? std::clamp<int64_t>(i + c.sk - c.sq + 1, 0, c.sk) : c.sk;
        std::vector<double> weights(static_cast<size_t>(seen));
        double top = -INFINITY, sum = 0;
        for (int64_t t = 0; t < seen; ++t) {
          double score = 0;
          for (int64_t e = 0; e < kD; ++e)
            score += double{q.value(b, i, h, e)} * k.value(b, t, h / (c.hq / c.hk), e);
          weights[static_cast<size_t>(t)] = score * scale;
          top = std::max(top, score * scale);
        }
        for (double& weight : weights) sum += weight = std::exp(weight - top);
        judge(lse[static_cast<size_t>((b * c.hq + h) * c.sq + i)],
              seen ? top + std::log(sum) : -INFINITY, 1e-4);
        for (int64_t e = 0; e < kD; ++e) {
          double value = 0, size = 0;
          for (int64_t t = 0; t < seen; ++t) {
            const double term =
                weights[static_cast<size_t>(t)] / sum * v.value(b, t, h / (c.hq / c.hk), e);
            value += term;
            size += std::fabs(term);
          }
          // weights and result are each rounded once
          judge(out.value(b, i, h, e), value, 2 * unit * (size + std::fabs(value)) + 1e-6);
        }
      }
  // nothing beside the rows that exist was written
  for (int64_t b = 0; b < c.b; ++b)
    for (int64_t i = 0; i <= c.sq; ++i)
      for (int64_t h = 0; h <= c.hq; ++h)
        if ((i == c.sq || h == c.hq) && out.at(b, i, h, 0) != 0x7fff) worst = INFINITY;
  return worst;
}

constexpr Case kCases[] = {
    {1, 1, 1, 1, 1, false, 1},     {1, 1, 3, 1, 1, true, 1},     {1, 65, 127, 2, 1, false, 2},
    {1, 193, 193, 1, 1, true, 1},  {2, 70, 257, 2, 1, true, 1},  {1, 130, 61, 1, 1, true, 2},
    {1, 129, 353, 2, 2, false, 1}, {1, 385, 390, 1, 1, true, 1},
};

}  // namespace
}  // namespace heddle

int main(int argc, char** argv) {
  using namespace heddle;
  const uint64_t first = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
  emulator::seed(first);
  emulator::Random random(first);
  double worst = 0;
  for (const Case& c : kCases) {
    const double error = check(c, random);
    if (!(error <= 1))
      std::printf("wrong: b%d sq%d sk%d hq%d hk%d %s: %g times the error allowed\n",
                  static_cast<int>(c.b), static_cast<int>(c.sq), static_cast<int>(c.sk),
                  static_cast<int>(c.hq), static_cast<int>(c.hk), c.causal ? "causal" : "dense",
                  error);
    worst = std::max(worst, error);
  }
  std::printf("error: %g of what is allowed\n", worst);
  return worst <= 1 ? 0 : 1;
}
