#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "attention/split_sm90.h"
#include "common/sm90.cuh"

// A Hopper attention kernel on the emulator, against its definition in float64
namespace heddle {

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
  int64_t page_size = 0;  // k and v lie in pages of this size
};

// One more row and head than the kernel may touch, all of it NaN
template <DType kType> struct HeadArray {
  HeadArray(int64_t b, int64_t s, int64_t h, int64_t d, int64_t gap)
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

inline float normal(emulator::Random& random) {
  float sum = 0;
  for (int i = 0; i < 12; ++i) sum += static_cast<float>(random.below(1 << 16)) / 65536.f;
  return sum - 6;
}

// The largest error over what is allowed, which is above 1 when the kernel is wrong
template <DType kType>
double check(const Case& c, int64_t d, int64_t dv, emulator::Random& random,
             const std::function<void(SplitCall&)>& run) {
  // pages of one sequence after another, in descending order and with one between that nobody uses
  const int64_t pages_each = c.page_size ? (c.sk + c.page_size - 1) / c.page_size : 1;
  const int64_t blocks = c.page_size ? 2 * c.b * pages_each : c.b;
  const int64_t block_rows = c.page_size ? c.page_size : c.sk;
  std::vector<int32_t> table;
  for (int64_t i = 0; i < c.b * pages_each; ++i)
    table.push_back(static_cast<int32_t>(blocks - 1 - 2 * i));
  const auto block_of = [&](int64_t b, int64_t t) {
    return c.page_size ? table[static_cast<size_t>(b * pages_each + t / c.page_size)] : b;
  };
  using Array = HeadArray<kType>;
  Array q(c.b, c.sq, c.hq, d, 0), k(blocks, block_rows, c.hk, d, 8),
      v(blocks, block_rows, c.hk, dv, 0), out(c.b, c.sq, c.hq, dv, 0);
  const auto key_value = [&](Array& x, int64_t b, int64_t t, int64_t h, int64_t e) -> uint16_t& {
    return x.at(block_of(b, t), t % block_rows, h, e);
  };
  const auto draw = [&](Array& to, int64_t s, int64_t h, int64_t size, float scale) {
    for (int64_t b = 0; b < c.b; ++b)
      for (int64_t i = 0; i < (c.cached.empty() || &to == &q ? s : c.cached[size_t(b)]); ++i)
        for (int64_t j = 0; j < h; ++j)
          for (int64_t e = 0; e < size; ++e)
            (&to == &q ? q.at(b, i, j, e) : key_value(to, b, i, j, e)) =
                emulator::encode(kType, scale * normal(random));
  };
  draw(q, c.sq, c.hq, d, 2);
  draw(k, c.sk, c.hk, d, 1);
  draw(v, c.sk, c.hk, dv, 1);
  for (int64_t h = 0; c.poisoned >= 0 && h < c.hk; ++h) {
    for (int64_t e = 0; e < d; ++e) key_value(k, 0, c.poisoned, h, e) = 0x7fff;
    for (int64_t e = 0; e < dv; ++e) key_value(v, 0, c.poisoned, h, e) = 0x7fff;
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

  SplitCall call{};
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
  if (c.page_size) {
    call.block_table = table.data();
    call.table_row = pages_each;
    call.table_column = 1;
    call.pages = blocks;
    call.page_size = c.page_size;
  }
  // what is not written must not be read
  std::vector<float> part_out(static_cast<size_t>(2 * c.processors * kSplitRows * dv), NAN);
  std::vector<float2> part_state(static_cast<size_t>(2 * c.processors * kSplitRows), {NAN, NAN});
  std::vector<int> arrivals(static_cast<size_t>(c.b * c.hk * split_row_tiles(call)), 0);
  call.part_out = part_out.data();
  call.part_state = part_state.data();
  call.arrivals = arrivals.data();
  run(call);

  const double unit = kType == DType::kBF16 ? 0x1p-8 : 0x1p-11;
  const auto zero = [](int counter) { return counter == 0; };
  const bool left = std::ranges::all_of(tickets, zero) && std::ranges::all_of(arrivals, zero);
  double worst = left ? 0 : INFINITY;
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
            score += double{q.value(b, q0 + i, h, e)} *
                     emulator::decode(kType, key_value(k, b, k0 + t, head, e));
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
                weights[t] / sum *
                emulator::decode(kType,
                                 key_value(v, b, k0 + from + static_cast<int64_t>(t), head, e));
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

// Runs cases with the random seed that the command line names; what main returns
template <DType kType, size_t N>
int check_all(const Case (&cases)[N], int d, int dv, int argc, char** argv,
              const std::function<void(const Case&, SplitCall&)>& run) {
  const uint64_t first = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
  emulator::seed(first);
  emulator::Random random(first);
  double worst = 0;
  for (const Case& c : cases) {
    const double error = check<kType>(c, d - c.narrower, dv - c.narrower, random,
                                      [&](SplitCall& call) { run(c, call); });
    if (!(error <= 1))
      std::printf("wrong: case %d: %g times the error allowed\n", static_cast<int>(&c - cases),
                  error);
    worst = std::max(worst, error);
  }
  std::printf("error: %g of what is allowed\n", worst);
  return worst <= 1 ? 0 : 1;
}

}  // namespace heddle
