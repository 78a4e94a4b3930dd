// The Hopper forward kernel on the emulator, against its definition in float64
#include "attention/forward_sm90.cuh"

#include <cstdio>
#include <cstdlib>
#include <vector>

namespace heddle {
namespace {

#ifndef HEDDLE_D
#define HEDDLE_D 64
#endif
#ifndef HEDDLE_DV
#define HEDDLE_DV HEDDLE_D
#endif
#ifndef HEDDLE_DTYPE
#define HEDDLE_DTYPE kBF16
#endif
constexpr int kD = HEDDLE_D, kDv = HEDDLE_DV;
constexpr DType kType = DType::HEDDLE_DTYPE;

struct Sequence {
  int64_t sq, sk;
};

struct Case {
  int64_t b, sq, sk, hq, hk;
  bool causal = false;
  int64_t window = 0;
  bool mapped = false, sink = false;
  int64_t narrower = 0;               // by how much d and dv are smaller than the kernel's
  std::vector<Sequence> packed = {};  // cuSeqlens, or
  std::vector<int64_t> cached = {};   // cacheSeqlens
  int processors = 1;
  int64_t poisoned = -1;  // this key and its value are not numbers
};

// One more row and head than the kernel may touch, all of it NaN
struct Array {
  Array(int64_t b, int64_t s, int64_t h, int64_t d, int64_t gap)
      : strides{(s + 1) * (h + 1) * (d + gap), (h + 1) * (d + gap), d + gap},
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
  const int64_t d = kD - c.narrower, dv = kDv - c.narrower;
  Array q(c.b, c.sq, c.hq, d, 0), k(c.b, c.sk, c.hk, d, 8), v(c.b, c.sk, c.hk, dv, 0),
      out(c.b, c.sq, c.hq, dv, 0);
  const auto draw = [&](Array& to, int64_t s, int64_t h, int64_t size, float scale) {
    for (int64_t b = 0; b < c.b; ++b)
      for (int64_t i = 0; i < (c.cached.empty() || &to == &q ? s : c.cached[size_t(b)]); ++i)
        for (int64_t j = 0; j < h; ++j)
          for (int64_t e = 0; e < size; ++e)
            to.at(b, i, j, e) = emulator::encode(kType, scale * normal(random));
  };
  draw(q, c.sq, c.hq, d, 2);
  draw(k, c.sk, c.hk, d, 1);
  draw(v, c.sk, c.hk, dv, 1);
  for (int64_t h = 0; c.poisoned >= 0 && h < c.hk; ++h) {
    for (int64_t e = 0; e < d; ++e) k.at(0, c.poisoned, h, e) = 0x7fff;
    for (int64_t e = 0; e < dv; ++e) v.at(0, c.poisoned, h, e) = 0x7fff;
  }
  std::vector<float> lse(static_cast<size_t>(c.b * c.hq * c.sq), NAN);
  std::vector<float> slopes, sink;
  for (int64_t h = 0; h < c.hq; ++h) {
    slopes.push_back(0.01f * static_cast<float>(h + 1));
    sink.push_back(static_cast<float>(h) - 1);
  }
  std::vector<int32_t> cu_q{0}, cu_k{0}, cache;
  for (const Sequence& sequence : c.packed) {
    cu_q.push_back(cu_q.back() + static_cast<int32_t>(sequence.sq));
    cu_k.push_back(cu_k.back() + static_cast<int32_t>(sequence.sk));
  }
  for (const int64_t length : c.cached) cache.push_back(static_cast<int32_t>(length));
  int tickets[2] = {};

  ForwardCall call{};
  call.dtype = kType;
  call.b = c.b;
  call.sq = c.sq;
  call.sk = c.sk;
  call.hq = c.hq;
  call.hk = c.hk;
  call.d = d;
  call.dv = dv;
  call.q = q.data();
  call.k = k.data();
  call.v = v.data();
  call.out = out.data();
  call.lse = lse.data();
  call.q_strides = q.strides;
  call.k_strides = k.strides;
  call.v_strides = v.strides;
  call.out_strides = out.strides;
  call.scale = 1 / std::sqrt(static_cast<float>(d));
  call.soft_cap = c.mapped ? 3.f : 0.f;
  call.causal = c.causal;
  call.window = c.window;
  call.slopes = c.mapped ? slopes.data() : nullptr;
  call.sink = c.sink ? sink.data() : nullptr;
  call.slopes_stride = call.sink_stride = 1;
  if (!c.packed.empty()) {
    call.cu_seqlens_q = cu_q.data();
    call.cu_seqlens_k = cu_k.data();
    call.cu_q_stride = call.cu_k_stride = 1;
    call.sequences = static_cast<int64_t>(c.packed.size());
  }
  call.cache_seqlens = c.cached.empty() ? nullptr : cache.data();
  call.cache_stride = 1;
  call.processors = c.processors;
  call.tickets = tickets;
  c.mapped ? launch_forward_sm90<kType, kD, kDv, true>(call, nullptr)
           : launch_forward_sm90<kType, kD, kDv, false>(call, nullptr);

  const double unit = kType == DType::kBF16 ? 0x1p-8 : 0x1p-11;
  double worst = tickets[0] == 0 && tickets[1] == 0 ? 0 : INFINITY;
  const auto judge = [&](double actual, double expected, double allowed) {
    const bool same = actual == expected || (std::isnan(actual) && std::isnan(expected));
    const double error = same ? 0 : std::fabs(actual - expected) / allowed;
    // otherwise NaN counts as wrong
    worst = error <= worst ? worst : std::isnan(error) ? INFINITY : error;
  };
  const auto judge_sequence = [&](int64_t b, int64_t q0, int64_t sq, int64_t k0, int64_t sk) {
    for (int64_t h = 0; h < c.hq; ++h)
      for (int64_t i = 0; i < sq; ++i) {
        const int64_t position = i + sk - sq, head = h / (c.hq / c.hk);
        const bool ends = c.causal || c.window;
        const int64_t until = ends ? std::clamp<int64_t>(position + 1, 0, sk) : sk;
        const int64_t from = c.window ? std::max<int64_t>(position - c.window + 1, 0) : 0;
        std::vector<double> weights;
        double top = c.sink ? sink[size_t(h)] : -INFINITY;
        for (int64_t t = from; t < until; ++t) {
          double score = 0;
          for (int64_t e = 0; e < d; ++e)
            score += double{q.value(b, q0 + i, h, e)} * k.value(b, k0 + t, head, e);
          score *= call.scale;
          if (c.mapped)
            score = 3 * std::tanh(score / 3) +
                    double{slopes[size_t(h)]} * static_cast<double>(t - position);
          weights.push_back(score);
          top = std::max(top, score);
        }
        double sum = c.sink ? std::exp(sink[size_t(h)] - top) : 0;
        for (double& weight : weights) sum += weight = std::exp(weight - top);
        judge(lse[static_cast<size_t>((b * c.hq + h) * c.sq + q0 + i)],
              sum == 0 ? -INFINITY : top + std::log(sum), 1e-4);
        for (int64_t e = 0; e < dv; ++e) {
          double value = 0, size = 0;
          for (size_t t = 0; t < weights.size(); ++t) {
            const double term =
                weights[t] / sum * v.value(b, k0 + from + static_cast<int64_t>(t), head, e);
            value += term;
            size += std::fabs(term);
          }
          // weights and result are each rounded once
          judge(out.value(b, q0 + i, h, e), value, 2 * unit * (size + std::fabs(value)) + 1e-6);
        }
      }
  };
  int64_t q0 = 0, k0 = 0;
  for (const Sequence& sequence : c.packed) {
    judge_sequence(0, q0, sequence.sq, k0, sequence.sk);
    q0 += sequence.sq;
    k0 += sequence.sk;
  }
  if (c.packed.empty())
    for (int64_t b = 0; b < c.b; ++b)
      judge_sequence(b, 0, c.sq, 0, c.cached.empty() ? c.sk : c.cached[size_t(b)]);
  // nothing beside the rows that exist was written
  for (int64_t b = 0; b < c.b; ++b)
    for (int64_t i = 0; i <= c.sq; ++i)
      for (int64_t h = 0; h <= c.hq; ++h)
        if ((i == c.sq || h == c.hq) && out.at(b, i, h, 0) != 0x7fff) worst = INFINITY;
  return worst;
}

const Case kCases[] = {
    {.b = 1, .sq = 1, .sk = 1, .hq = 1, .hk = 1},
    {.b = 1, .sq = 1, .sk = 3, .hq = 1, .hk = 1, .causal = true},
    {.b = 1, .sq = 65, .sk = 127, .hq = 2, .hk = 1, .processors = 2},
    {.b = 1, .sq = 193, .sk = 193, .hq = 1, .hk = 1, .causal = true, .narrower = 8},
    {.b = 2, .sq = 70, .sk = 257, .hq = 2, .hk = 1, .causal = true, .mapped = true},
    {.b = 1, .sq = 130, .sk = 61, .hq = 1, .hk = 1, .causal = true, .sink = true, .processors = 2},
    {.b = 1, .sq = 129, .sk = 353, .hq = 2, .hk = 2, .mapped = true, .narrower = 24},
    {.b = 1, .sq = 385, .sk = 390, .hq = 1, .hk = 1, .causal = true},
    {.b = 1, .sq = 200, .sk = 600, .hq = 1, .hk = 1, .window = 150, .sink = true},
    {.b = 1, .sq = 90, .sk = 100, .hq = 2, .hk = 1, .causal = true, .poisoned = 71},
    {.b = 1,
     .sq = 70,
     .sk = 70,
     .hq = 1,
     .hk = 1,
     .window = 20,
     .mapped = true,
     .narrower = 8,
     .poisoned = 9},
    {.b = 1,
     .sq = 215,
     .sk = 275,
     .hq = 2,
     .hk = 1,
     .causal = true,
     .packed = {{70, 1}, {0, 130}, {5, 0}, {129, 129}, {11, 15}},
     .processors = 2},
    {.b = 3, .sq = 20, .sk = 300, .hq = 2, .hk = 1, .causal = true, .cached = {300, 20, 131}},
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
      std::printf("wrong: case %d: %g times the error allowed\n", static_cast<int>(&c - kCases),
                  error);
    worst = std::max(worst, error);
  }
  std::printf("error: %g of what is allowed\n", worst);
  return worst <= 1 ? 0 : 1;
}
