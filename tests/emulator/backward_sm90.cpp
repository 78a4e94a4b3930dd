// The Hopper backward on the emulator, with what it leaves to the portable one, or that one alone;
// against the chain rule in float64
#include "attention/backward_sm90.cuh"

#include "attention/backward_portable.cuh"
#include "portable_check.h"
#include "variant.h"

namespace heddle {
namespace {

#ifndef HEDDLE_PORTABLE
#define HEDDLE_PORTABLE false
#endif
constexpr bool kPortable = HEDDLE_PORTABLE;
using Array = HeadArray<kType>;

// A sum and the size of its terms, each of which may be wrong by a rounding; and what so many
// roundings come to where they are independent
struct Sum {
  double value = 0, size = 0, squares = 0;
  void add(double term) {
    value += term;
    size += std::fabs(term);
    squares += term * term;
  }
};

struct BackwardCase : Case {
  bool atomics = false, sloped = false;
};

double check(const BackwardCase& c, emulator::Random& random) {
  const int64_t d = kD - c.narrower;
  Array q(c.b, c.sq, c.hq, d, 0), k(c.b, c.sk, c.hk, d, 8), v(c.b, c.sk, c.hk, d, 0),
      out(c.b, c.sq, c.hq, d, 0), dout(c.b, c.sq, c.hq, d, 8);
  const auto draw = [&](Array& to, int64_t s, int64_t h, float scale) {
    for (int64_t b = 0; b < c.b; ++b)
      for (int64_t i = 0; i < s; ++i)
        for (int64_t j = 0; j < h; ++j)
          for (int64_t e = 0; e < d; ++e)
            to.at(b, i, j, e) = emulator::encode(kType, scale * normal(random));
  };
  draw(q, c.sq, c.hq, 1.5f);
  draw(k, c.sk, c.hk, 1);
  draw(v, c.sk, c.hk, 1);
  draw(dout, c.sq, c.hq, 1);
  for (size_t b = 0; b < c.cached.size(); ++b)
    for (int64_t t = c.cached[b]; t < c.sk; ++t)
      for (int64_t h = 0; h < c.hk; ++h)
        for (int64_t e = 0; e < d; ++e)
          k.at(int64_t(b), t, h, e) = v.at(int64_t(b), t, h, e) = 0x7fff;
  for (int64_t h = 0; c.poisoned >= 0 && h < c.hk; ++h)
    for (int64_t e = 0; e < d; ++e) k.at(0, c.poisoned, h, e) = v.at(0, c.poisoned, h, e) = 0x7fff;
  std::vector<int32_t> cu_q{0}, cu_k{0}, cache;
  for (const Sequence& sequence : c.packed) {
    cu_q.push_back(cu_q.back() + static_cast<int32_t>(sequence.sq));
    cu_k.push_back(cu_k.back() + static_cast<int32_t>(sequence.sk));
  }
  for (const int64_t length : c.cached) cache.push_back(static_cast<int32_t>(length));
  // what meets nobody may hold anything
  for (size_t n = 0; n < c.packed.size(); ++n)
    for (int64_t e = 0; e < d; ++e) {
      for (int64_t i = cu_q[n]; i < cu_q[n + 1] && c.packed[n].sk == 0; ++i)
        for (int64_t h = 0; h < c.hq; ++h) q.at(0, i, h, e) = dout.at(0, i, h, e) = 0x7fff;
      for (int64_t t = cu_k[n]; t < cu_k[n + 1] && c.packed[n].sq == 0; ++t)
        for (int64_t h = 0; h < c.hk; ++h) k.at(0, t, h, e) = v.at(0, t, h, e) = 0x7fff;
    }
  const float scale = 1 / std::sqrt(static_cast<float>(d));
  std::vector<float> slopes;
  for (int64_t h = 0; h < c.hq; ++h) slopes.push_back(0.01f * static_cast<float>(h + 2));

  // what the forward gives, and then the gradients
  std::vector<float> lse(static_cast<size_t>(c.b * c.hq * c.sq), NAN);
  const auto rows = static_cast<size_t>(c.b * c.sq * c.hq * d);
  const auto keys = static_cast<size_t>(c.b * c.sk * c.hk * d);
  std::vector<Sum> dq(rows), dk(keys), dv(keys), dslopes(static_cast<size_t>(c.hq));
  DrawnMask mask(c, random);
  const auto differentiate = [&](int64_t sequence, int64_t q0, int64_t sq, int64_t k0, int64_t sk) {
    const int64_t b = c.packed.empty() ? sequence : 0;
    for (int64_t h = 0; h < c.hq; ++h)
      for (int64_t i = 0; i < sq; ++i) {
        const int64_t position = i + sk - sq, kv = h / (c.hq / c.hk);
        const bool ends = c.causal || c.window;
        const int64_t until = ends ? std::clamp<int64_t>(position + 1, 0, sk) : sk;
        const int64_t from = c.window ? std::max<int64_t>(position - c.window + 1, 0) : 0;
        std::vector<int64_t> seen;
        for (int64_t t = from; t < until; ++t)
          if (mask.sees(sequence, q0, h, i, position, t)) seen.push_back(t);
        std::vector<double> weights, rates;
        double top = -INFINITY, sum = 0;
        for (const int64_t t : seen) {
          double score = 0;
          for (int64_t e = 0; e < d; ++e)
            score += double{q.value(b, q0 + i, h, e)} * k.value(b, k0 + t, kv, e);
          score *= scale;
          const double bent = std::tanh(score / 3);
          rates.push_back(c.mapped ? 1 - bent * bent : 1);
          weights.push_back(c.mapped ? 3 * bent : score);
          if (c.sloped)
            weights.back() += double{slopes[size_t(h)]} * static_cast<double>(t - position);
          top = std::max(top, weights.back());
        }
        for (double& weight : weights) sum += weight = std::exp(weight - top);
        lse[static_cast<size_t>((b * c.hq + h) * c.sq + q0 + i)] =
            static_cast<float>(weights.empty() ? -INFINITY : top + std::log(sum));
        double delta = 0;
        for (int64_t e = 0; e < d; ++e) {
          double value = 0;
          for (size_t t = 0; t < weights.size(); ++t)
            value += weights[t] / sum * v.value(b, k0 + seen[t], kv, e);
          out.at(b, q0 + i, h, e) = emulator::encode(kType, static_cast<float>(value));
          // of what was rounded, as the definition has it
          delta += double{out.value(b, q0 + i, h, e)} * dout.value(b, q0 + i, h, e);
        }
        for (size_t t = 0; t < weights.size(); ++t) {
          const int64_t key = k0 + seen[t];
          const double p = weights[t] / sum;
          double dp = 0;
          for (int64_t e = 0; e < d; ++e)
            dp += double{dout.value(b, q0 + i, h, e)} * v.value(b, key, kv, e);
          const double ds = p * (dp - delta) * rates[t] * scale;
          const double apart = static_cast<double>(seen[t] - position);
          dslopes[size_t(h)].add(p * (dp - delta) * apart);
          for (int64_t e = 0; e < d; ++e) {
            const auto at = static_cast<size_t>(((b * c.sk + key) * c.hk + kv) * d + e);
            dq[static_cast<size_t>(((b * c.sq + q0 + i) * c.hq + h) * d + e)].add(
                ds * k.value(b, key, kv, e));
            dk[at].add(ds * q.value(b, q0 + i, h, e));
            dv[at].add(p * dout.value(b, q0 + i, h, e));
          }
        }
      }
  };
  for (size_t n = 0; n < c.packed.size(); ++n)
    differentiate(int64_t(n), cu_q[n], c.packed[n].sq, cu_k[n], c.packed[n].sk);
  if (c.packed.empty())
    for (int64_t b = 0; b < c.b; ++b)
      differentiate(b, 0, c.sq, 0, c.cached.empty() ? c.sk : c.cached[size_t(b)]);

  BackwardCall call{};
  call.dtype = kType;
  call.b = c.b;
  call.sq = c.sq;
  call.sk = c.sk;
  call.hq = c.hq;
  call.hk = c.hk;
  call.d = call.dv = d;
  call.q = q.data();
  call.k = k.data();
  call.v = v.data();
  call.out = out.data();
  call.dout = dout.data();
  call.lse = lse.data();
  call.q_strides = q.strides;
  call.k_strides = k.strides;
  call.v_strides = v.strides;
  call.out_strides = out.strides;
  call.dout_strides = dout.strides;
  call.lse_batch = c.hq * c.sq;
  call.lse_head = c.sq;
  call.lse_row = 1;
  call.scale = scale;
  call.soft_cap = c.mapped ? 3.f : 0.f;
  call.slopes = c.sloped ? slopes.data() : nullptr;
  call.slopes_stride = 1;
  call.causal = c.causal;
  call.window = c.window;
  call.deterministic = !c.atomics;
  if (!c.packed.empty()) {
    call.cu_seqlens_q = cu_q.data();
    call.cu_seqlens_k = cu_k.data();
    call.cu_q_stride = call.cu_k_stride = 1;
    call.sequences = static_cast<int64_t>(c.packed.size());
  }
  call.cache_seqlens = c.cached.empty() ? nullptr : cache.data();
  call.cache_stride = 1;
  call.processors = c.processors;
  // what is not written must not be read; one more of each, that nobody may write
  const GradientTiles tiles(call);
  struct alignas(128) Line {
    Line() { std::fill_n(values, 32, NAN); }
    float values[32];
  };
  const auto poisoned = [](int64_t count) {
    return std::vector<Line>(static_cast<size_t>(count / 32) + 1);
  };
  auto row_lse = poisoned(c.b * c.hq * c.sq), row_delta = row_lse;
  auto tile_lse = poisoned(tiles.total_rows * tiles.queries), tile_delta = tile_lse;
  auto dq_sum = poisoned(tiles.total_rows * tiles.queries * tiles.columns);
  std::vector<int> counters(static_cast<size_t>(tiles.counters()) + 1, -77);
  call.row_lse = row_lse[0].values;
  call.row_delta = row_delta[0].values;
  call.tile_lse_log2 = tile_lse[0].values;
  call.tile_delta = tile_delta[0].values;
  call.dq_sum = dq_sum[0].values;
  call.counters = counters.data();
  auto part_sums = poisoned(tiles.part_sums());
  call.part_sums = part_sums[0].values;
  const int64_t slope_parts_each = kPortable ? c.sq : tiles.dslope_parts();
  std::vector<float> slope_parts(static_cast<size_t>(c.b * c.hq * slope_parts_each));
  call.dslope_parts = slope_parts.data();
  auto got_q = poisoned(static_cast<int64_t>(rows)), got_k = poisoned(static_cast<int64_t>(keys)),
       got_v = got_k;
  call.dq = &got_q[0];
  call.dk = &got_k[0];
  call.dv_out = &got_v[0];
  call.out_dtype = kType;
  mask.list(call);
  BackwardArgs args{};
  args.call = args_of(call);
  args.out = heads_of(call.out, call.out_strides);
  args.dout = heads_of(call.dout, call.dout_strides);
  args.dq = call.dq;
  args.dk = call.dk;
  args.dv = call.dv_out;
  args.lse = call.lse;
  args.lse_batch = call.lse_batch;
  args.lse_head = call.lse_head;
  args.lse_token = call.lse_row;
  args.row_lse = call.row_lse;
  args.row_delta = call.row_delta;
  args.slope_parts = slope_parts_each;
  std::vector<float> got_slopes(static_cast<size_t>(c.hq), NAN);
  if (c.sloped) args.dslopes = got_slopes.data();
  CudaContext context;
  if (kPortable) {
    if (c.sloped) args.dslope_parts = slope_parts.data();
    backward_portable(args, context);
  } else {
    call.masked            ? launch_backward_sm90<kType, kD, false, true>(call, nullptr)
    : c.mapped || c.sloped ? launch_backward_sm90<kType, kD, true>(call, nullptr)
                           : launch_backward_sm90<kType, kD, false>(call, nullptr);
  }

  const double unit = kType == DType::kBF16 ? 0x1p-8 : 0x1p-11;
  double worst = counters.back() == -77 ? 0 : INFINITY;
  if (!kPortable && c.mask.percent == 100) {
    // everything is listed: the same bits as without a mask
    const auto same = [](const std::vector<Line>& a, const std::vector<Line>& b) {
      return std::memcmp(a.data(), b.data(), a.size() * sizeof(Line)) == 0;
    };
    const std::vector<Line> before[] = {got_q, got_k, got_v};
    launch_backward_sm90<kType, kD, false>(call, nullptr);
    if (!same(before[0], got_q) || !same(before[1], got_k) || !same(before[2], got_v))
      worst = INFINITY;
  }
  if (!kPortable) {
    // left to be done once more, which only what is no number may cause
    const int* marks = tiles.marks(counters.data());
    const auto marked = std::count(marks, marks + tiles.total_rows + tiles.total_keys, 1);
    if ((marked > 0) != (c.poisoned >= 0)) worst = INFINITY;
    if (leaves_marks(call)) backward_redo(args, tiles, marks, context);
    args.dslope_parts = slope_parts.data();
    sum_heads(args, context);
  }
  const auto judge = [&](const std::vector<Sum>& expected, const void* results) {
    const auto* got = static_cast<const uint16_t*>(results);
    for (size_t i = 0; i < expected.size(); ++i) {
      const Sum& sum = expected[i];
      const double actual = emulator::decode(kType, got[i]);
      if (std::isnan(actual) && std::isnan(sum.value)) continue;
      const double error =
          std::fabs(actual - sum.value) / (2 * unit * (sum.size + std::fabs(sum.value)) + 1e-5);
      worst = error <= worst ? worst : std::isnan(error) ? INFINITY : error;
    }
    // nothing behind them was written
    uint16_t behind[2];
    std::memcpy(behind, got + (expected.size() + 1) / 2 * 2, 4);
    if (!std::isnan(emulator::decode(kType, behind[1]))) worst = INFINITY;
  };
  for (size_t h = 0; h < dslopes.size() && c.sloped; ++h) {
    const Sum& exact = dslopes[h];
    const double error =
        std::fabs(got_slopes[h] - exact.value) / (4 * unit * std::sqrt(exact.squares) + 1e-5);
    worst = error <= worst ? worst : std::isnan(error) ? INFINITY : error;
  }
  judge(dq, call.dq);
  judge(dk, call.dk);
  judge(dv, call.dv_out);
  return worst;
}

const BackwardCase kCases[] = {
    {{.b = 1, .sq = 1, .sk = 1, .hq = 1, .hk = 1}},
    {{.b = 1, .sq = 65, .sk = 127, .hq = 2, .hk = 1}, true},
    {{.b = 1, .sq = 257, .sk = 257, .hq = 1, .hk = 1, .causal = true}},
    {{.b = 2, .sq = 63, .sk = 130, .hq = 4, .hk = 2, .causal = true, .narrower = 8}, true},
    {{.b = 1, .sq = 130, .sk = 61, .hq = 1, .hk = 1, .causal = true, .mapped = true}},
    {{.b = 2, .sq = 113, .sk = 300, .hq = 1, .hk = 1, .mapped = true}, true},
    {{.b = 1, .sq = 200, .sk = 500, .hq = 1, .hk = 1, .window = 150}},
    {{.b = 1, .sq = 270, .sk = 270, .hq = 1, .hk = 1, .causal = true, .poisoned = 200}},
    {{.b = 1,
      .sq = 215,
      .sk = 275,
      .hq = 2,
      .hk = 1,
      .causal = true,
      .packed = {{70, 1}, {0, 130}, {5, 0}, {129, 129}, {11, 15}}}},
    {{.b = 1, .sq = 140, .sk = 300, .hq = 4, .hk = 2, .causal = true}, false, true},
    {{.b = 2, .sq = 130, .sk = 150, .hq = 3, .hk = 1, .window = 70, .mapped = true}, true, true},
    // nobody sees the key that is no number
    {{.b = 1, .sq = 64, .sk = 300, .hq = 2, .hk = 1, .window = 20, .poisoned = 150}, false, true},
    {{.b = 1,
      .sq = 90,
      .sk = 160,
      .hq = 2,
      .hk = 2,
      .causal = true,
      .packed = {{70, 30}, {0, 60}, {20, 70}}},
     false,
     true},
    // in turns what is written behind a sequence is put right by the next one
    {{.b = 1, .sq = 20, .sk = 40, .hq = 1, .hk = 1, .packed = {{9, 21}, {11, 19}}}, true},
    {{.b = 3, .sq = 64, .sk = 200, .hq = 1, .hk = 1, .cached = {200, 0, 131}}},
    // one of five key tiles comes in parts, and all of them
    {{.b = 1, .sq = 300, .sk = 600, .hq = 2, .hk = 1, .processors = 4}},
    {{.b = 1, .sq = 300, .sk = 140, .hq = 2, .hk = 1, .mapped = true, .processors = 9}, true},
    // masks of query heads, of kv heads and shared; of whole blocks, of cut ones and of single
    // keys; rows that see nothing and keys that nobody sees
    {{.b = 1, .sq = 1, .sk = 1, .hq = 1, .hk = 1, .mask = {128, 128, 1, 100}}},
    {{.b = 1, .sq = 150, .sk = 290, .hq = 4, .hk = 2, .causal = true, .mask = {64, 64, 4, 100}}},
    {{.b = 2, .sq = 257, .sk = 450, .hq = 2, .hk = 2, .causal = true, .mask = {64, 64, 2, 25}}},
    {{.b = 1, .sq = 300, .sk = 300, .hq = 4, .hk = 2, .causal = true, .mask = {128, 128, 4, 50}},
     true},
    {{.b = 1, .sq = 260, .sk = 700, .hq = 4, .hk = 2, .narrower = 24, .mask = {64, 64, 2, 10}}},
    {{.b = 1,
      .sq = 200,
      .sk = 333,
      .hq = 2,
      .hk = 1,
      .causal = true,
      .mask = {.block_q = 256,
               .block_k = 32,
               .heads = 1,
               .percent = 30,
               .window = 70,
               .sink_tokens = 5}}},
    {{.b = 1,
      .sq = 150,
      .sk = 410,
      .hq = 2,
      .hk = 2,
      .causal = true,
      .mask =
          {.block_q = 64, .block_k = 64, .heads = 2, .percent = 15, .columns = 3, .diagonals = 2}}},
    {{.b = 1,
      .sq = 210,
      .sk = 230,
      .hq = 1,
      .hk = 1,
      .causal = true,
      .mask = {.block_q = 128, .block_k = 128, .sink_tokens = 500, .document = 50}}},
    // a key that is no number in a tile that is visited for others
    {{.b = 1,
      .sq = 70,
      .sk = 140,
      .hq = 1,
      .hk = 1,
      .causal = true,
      .poisoned = 100,
      .mask = {.block_q = 16, .block_k = 16, .percent = 40}}},
    {{.b = 1,
      .sq = 415,
      .sk = 475,
      .hq = 2,
      .hk = 1,
      .causal = true,
      .packed = {{70, 1}, {0, 130}, {5, 0}, {329, 329}, {11, 15}},
      .mask = {.block_q = 64, .block_k = 64, .heads = 2, .percent = 50, .columns = 1}}},
    {{.b = 3,
      .sq = 20,
      .sk = 300,
      .hq = 2,
      .hk = 1,
      .cached = {300, 20, 131},
      .mask = {64, 64, 1, 60}}},
    // lists of several words, most of whose steps are of no other key tile
    {{.b = 1, .sq = 70, .sk = 4500, .hq = 1, .hk = 1, .narrower = 56, .mask = {64, 64, 1, 5}}},
};

}  // namespace
}  // namespace heddle

int main(int argc, char** argv) {
  using namespace heddle;
  return emulator::run_cases(
      kCases, argc, argv,
      [](const BackwardCase& c, emulator::Random& random) { return check(c, random); });
}
