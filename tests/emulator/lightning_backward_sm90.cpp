// Both sweeps of the Hopper backward on the emulator, against the gradients in float64
#include "lightning/backward_sm90.cuh"

#include <vector>

#include "lightning_check.h"

namespace heddle {
namespace {

#ifndef HEDDLE_SIZE
#define HEDDLE_SIZE 64
#endif
#ifndef HEDDLE_DTYPE
#define HEDDLE_DTYPE kBF16
#endif
constexpr int kSize = HEDDLE_SIZE;
constexpr DType kType = DType::HEDDLE_DTYPE;
constexpr float kScale = 0.7f;

struct Case {
  int64_t b, s, heads = 1, hk = 1, hs = 1;
  bool states = false;  // an initial one, whose gradient is asked for, and a gradient of the last
  int segment = 0;
  int64_t d = kSize, e = kSize;
  std::vector<int64_t> packed = {};  // lengths for cuSeqlens
};

// [sequences, heads, d, e] in f32 and one number behind, which starts as NaN
struct States {
  std::vector<float> values;
  States(int64_t count, emulator::Random* random) : values(static_cast<size_t>(count + 1), NAN) {
    for (int64_t i = 0; random && i < count; ++i) values[static_cast<size_t>(i)] = normal(*random);
  }
};

double check(const Case& c, emulator::Random& random) {
  const int64_t d = c.d, e = c.e, share = c.heads / c.hk;
  const auto sequences = c.packed.empty() ? c.b : static_cast<int64_t>(c.packed.size());
  Array q(kType, {c.b, c.s, c.heads, d}, true), k(kType, {c.b, c.s, c.hk, d}, true),
      v(kType, {c.b, c.s, c.hk, e}, true), dout(kType, {c.b, c.s, c.heads, e}, true),
      dq(kType, {c.b, c.s, c.heads, d}, false), dk(kType, {c.b, c.s, c.heads, d}, false),
      dv(kType, {c.b, c.s, c.heads, e}, false);
  q.draw(random, 1);
  k.draw(random, 0.3f);
  v.draw(random, 1);
  dout.draw(random, 1);
  std::vector<float> wide_dk(static_cast<size_t>(c.b * c.s * c.heads * d + 1), NAN),
      wide_dv(static_cast<size_t>(c.b * c.s * c.heads * e + 1), NAN);
  std::vector<int32_t> offsets{0};
  for (const int64_t length : c.packed)
    offsets.push_back(offsets.back() + static_cast<int32_t>(length));
  std::vector<float> slopes;
  for (int64_t h = 0; h < c.hs; ++h) slopes.push_back(draw_slope(random, c.segment != 0));
  const int64_t state_size = d * e;
  States initial(sequences * c.hs * state_size, &random),
      dstate(sequences * c.hs * state_size, &random),
      dinitial(sequences * c.heads * state_size, nullptr);
  int fault = 0;

  SweepCall call{};
  call.dtype = kType;
  call.b = c.b;
  call.s = c.s;
  call.d = d;
  call.e = e;
  call.hq = call.heads = c.heads;
  call.hk = call.hv = c.hk;
  call.hs = c.hs;
  call.q = q.data();
  call.k = k.data();
  call.v = v.data();
  call.dout = dout.data();
  call.q_strides = q.strides;
  call.k_strides = k.strides;
  call.v_strides = v.strides;
  call.dout_strides = dout.strides;
  call.dk = share > 1 ? static_cast<void*>(wide_dk.data()) : dk.data();
  call.dv = share > 1 ? static_cast<void*>(wide_dv.data()) : dv.data();
  call.scale = kScale;
  call.slopes = slopes.data();
  call.slopes_stride = 1;
  call.cu_seqlens = c.packed.empty() ? nullptr : offsets.data();
  call.cu_stride = 1;
  call.sequences = sequences;
  const int64_t strides[4] = {c.hs * state_size, state_size, e, 1};
  std::copy_n(strides, 4, call.initial_strides);
  if (c.states) {
    call.initial_state = dstate.values.data();
    call.state = dinitial.values.data();
  }
  call.processors = 4;
  call.fault = &fault;
  ScanPlan plan{};
  plan.rows = plan.columns = kSize;
  plan.slices = plan.parts = 1;
  plan.segment = c.segment ? c.segment : static_cast<int>(c.s / 64 + 1) * 64;
  plan.segments = static_cast<int>((c.s + plan.segment - 1) / plan.segment);
  plan.slots = c.packed.empty() ? c.b * plan.segments : c.s / plan.segment + sequences;
  plan.summed = c.segment ? plan.slots : 0;
  std::vector<float> summaries(static_cast<size_t>(plan.summary_size(call) + 4), NAN);
  call.summaries = summaries.data();
  while (reinterpret_cast<uintptr_t>(call.summaries) % 16 != 0) ++call.summaries;
  launch_scan_sm90<kType, kSize, kSize>(
      scan_for_dq(call, c.states ? initial.values.data() : nullptr, strides, dq.data()), plan,
      nullptr);
  std::fill(summaries.begin(), summaries.end(), NAN);
  launch_sweep_sm90<kType, kSize>(call, plan, nullptr);

  double worst = fault ? INFINITY : 0;
  const double allowed = kType == DType::kBF16 ? 5e-3 : 1e-3;
  for (int64_t n = 0; n < sequences; ++n) {
    const int64_t b = c.packed.empty() ? n : 0;
    const int64_t begin = c.packed.empty() ? 0 : offsets[size_t(n)];
    const int64_t end = c.packed.empty() ? c.s : offsets[size_t(n) + 1];
    for (int64_t h = 0; h < c.heads; ++h) {
      const int64_t hk = h / share, hs = h / (c.heads / c.hs);
      const double lambda = std::exp(-double{slopes[size_t(hs)]});
      const int64_t at = (n * c.hs + hs) * state_size;
      std::vector<double> S(static_cast<size_t>(state_size), 0), R = S;
      if (c.states) {
        std::copy_n(initial.values.begin() + at, state_size, S.begin());
        // heads that share a state have its gradient once
        if (h % (c.heads / c.hs) == 0)
          std::copy_n(dstate.values.begin() + at, state_size, R.begin());
      }
      Error dq_error, dk_error, dv_error, state_error;
      for (int64_t t = begin; t < end; ++t)
        for (int64_t i = 0; i < d; ++i) {
          double sum = 0;
          for (int64_t f = 0; f < e; ++f) {
            double& cell = S[static_cast<size_t>(i * e + f)];
            cell = lambda * cell + k.value(b, t, hk, i) * v.value(b, t, hk, f);
            sum += kScale * dout.value(b, t, h, f) * cell;
          }
          dq_error.add(dq.value(b, t, h, i), sum);
        }
      for (int64_t t = end - 1; t >= begin; --t) {
        std::vector<double> row(static_cast<size_t>(e), 0);
        const auto token = static_cast<size_t>((b * c.s + t) * c.heads + h);
        for (int64_t i = 0; i < d; ++i) {
          double sum = 0;
          for (int64_t f = 0; f < e; ++f) {
            double& cell = R[static_cast<size_t>(i * e + f)];
            cell += kScale * q.value(b, t, h, i) * dout.value(b, t, h, f);
            sum += v.value(b, t, hk, f) * cell;
            row[size_t(f)] += k.value(b, t, hk, i) * cell;
            cell *= lambda;
          }
          dk_error.add(
              share > 1 ? double{wide_dk[token * size_t(d) + size_t(i)]} : dk.value(b, t, h, i),
              sum);
        }
        for (int64_t f = 0; f < e; ++f)
          dv_error.add(
              share > 1 ? double{wide_dv[token * size_t(e) + size_t(f)]} : dv.value(b, t, h, f),
              row[size_t(f)]);
      }
      for (int64_t i = 0; c.states && i < state_size; ++i)
        // what underflows in f32 is zero
        state_error.add(dinitial.values[static_cast<size_t>((n * c.heads + h) * state_size + i)],
                        static_cast<float>(R[static_cast<size_t>(i)]));
      worst = std::max({worst, dq_error.relative() / allowed, dk_error.relative() / allowed,
                        dv_error.relative() / allowed, state_error.relative() / 1e-5});
    }
  }
  // nothing beside what exists was written
  const bool clean = dq.untouched_behind() && dk.untouched_behind() && dv.untouched_behind() &&
                     std::isnan(wide_dk.back()) && std::isnan(wide_dv.back()) &&
                     std::isnan(dinitial.values.back());
  return clean ? worst : INFINITY;
}

#if HEDDLE_SIZE == 64
const Case kCases[] = {
    {.b = 1, .s = 1, .states = true},
    {.b = 2, .s = 200, .heads = 2, .hk = 2, .hs = 2},
    {.b = 1, .s = 450, .states = true},
    {.b = 2, .s = 199, .states = true, .segment = 64},
    {.b = 1, .s = 130, .heads = 2, .states = true, .d = 40, .e = 56},
    {.b = 1, .s = 163, .states = true, .segment = 64, .packed = {0, 1, 130, 32}},
    {.b = 1, .s = 140, .heads = 2, .hs = 2, .packed = {70, 6, 64}},
};
#else
const Case kCases[] = {
    {.b = 1, .s = 300, .segment = 128, .d = 128, .e = 72},
    {.b = 1, .s = 140, .states = true, .segment = 64, .packed = {90, 50}},
    {.b = 1, .s = 512},
    {.b = 1, .s = 330, .states = true, .packed = {0, 320, 10}},
};
#endif

}  // namespace
}  // namespace heddle

int main(int argc, char** argv) {
  using namespace heddle;
  return emulator::run_cases(kCases, argc, argv, check);
}
