// The Hopper scan on the emulator, against the recurrence in float64
#include "lightning/forward_sm90.cuh"

#include <vector>

#include "lightning_check.h"

namespace heddle {
namespace {

#ifndef HEDDLE_D
#define HEDDLE_D 64
#endif
#ifndef HEDDLE_E
#define HEDDLE_E 64
#endif
#ifndef HEDDLE_DTYPE
#define HEDDLE_DTYPE kBF16
#endif
constexpr int kD = HEDDLE_D, kE = HEDDLE_E;
constexpr DType kType = DType::HEDDLE_DTYPE;

struct Case {
  int64_t b, s, hq = 1, hk = 1, hv = 1, hs = 1;
  bool initial = false, state = false;
  int segment = 0, parts = 1;
  float slope = -1;                  // of all heads, drawn where it is negative
  int64_t narrower = 0;              // by how much d and e are smaller than the kernel's
  int slices = 1;                    // times kE
  std::vector<int64_t> packed = {};  // lengths for cuSeqlens, the last is of NaN alone
};

double check(const Case& c, emulator::Random& random) {
  const int64_t d = kD - c.narrower, e = kE * c.slices - c.narrower;
  const int64_t heads = std::max(c.hq, c.hv);
  const auto sequences = c.packed.empty() ? c.b : static_cast<int64_t>(c.packed.size());
  Array q(kType, {c.b, c.s, c.hq, d}, true), k(kType, {c.b, c.s, c.hk, d}, true),
      v(kType, {c.b, c.s, c.hv, e}, true), out(kType, {c.b, c.s, heads, e}, false);
  q.draw(random, 1);
  k.draw(random, 0.3f);
  v.draw(random, 1);
  std::vector<int32_t> offsets{0};
  for (const int64_t length : c.packed)
    offsets.push_back(offsets.back() + static_cast<int32_t>(length));
  const int64_t checked = sequences - !c.packed.empty();
  for (int64_t t = c.packed.empty() ? c.s : offsets[size_t(checked)]; t < c.s; ++t) {
    for (int64_t i = 0; i < c.hk * d; ++i) k.at(0, t, i / d, i % d) = 0x7fff;
    for (int64_t i = 0; i < c.hv * e; ++i) v.at(0, t, i / e, i % e) = 0x7fff;
  }
  std::vector<float> slopes, initial, state(static_cast<size_t>(sequences * c.hs * d * e + 1), NAN);
  for (int64_t h = 0; h < c.hs; ++h)
    slopes.push_back(c.slope < 0 ? draw_slope(random, c.segment != 0) : c.slope);
  for (int64_t i = 0; i < sequences * c.hs * d * e; ++i) initial.push_back(normal(random));
  int fault = 0;

  ScanCall call{};
  call.dtype = kType;
  call.b = c.b;
  call.s = c.s;
  call.d = d;
  call.e = e;
  call.hq = c.hq;
  call.hk = c.hk;
  call.hv = c.hv;
  call.heads = heads;
  call.hs = c.hs;
  call.q = q.data();
  call.k = k.data();
  call.v = v.data();
  call.out = out.data();
  call.q_strides = q.strides;
  call.k_strides = k.strides;
  call.v_strides = v.strides;
  call.scale = 0.7f;
  call.slopes = slopes.data();
  call.slopes_stride = 1;
  call.cu_seqlens = c.packed.empty() ? nullptr : offsets.data();
  call.cu_stride = 1;
  call.sequences = sequences;
  call.initial_state = c.initial ? initial.data() : nullptr;
  const int64_t strides[4] = {c.hs * d * e, d * e, e, 1};
  std::copy_n(strides, 4, call.initial_strides);
  call.state = c.state ? state.data() : nullptr;
  call.processors = 4;
  call.fault = &fault;
  ScanPlan plan{};
  plan.rows = kD;
  plan.columns = kE;
  plan.slices = c.slices;
  plan.parts = c.parts;
  plan.segment = c.segment ? c.segment : static_cast<int>(c.s / 64 + 1) * 64;
  plan.segments = static_cast<int>((c.s + plan.segment - 1) / plan.segment);
  plan.slots = c.packed.empty() ? c.b * plan.segments : c.s / plan.segment + sequences;
  plan.summed = c.segment == 0 ? 0 : c.packed.empty() ? plan.slots - c.b : plan.slots;
  std::vector<float> summaries(static_cast<size_t>(plan.summary_size(call) + 4), NAN);
  call.summaries = summaries.data();
  while (reinterpret_cast<uintptr_t>(call.summaries) % 16 != 0) ++call.summaries;
  launch_scan_sm90<kType, kD, kE>(call, plan, nullptr);

  double worst = fault ? INFINITY : 0;
  for (int64_t n = 0; n < checked; ++n) {
    const int64_t b = c.packed.empty() ? n : 0;
    const int64_t begin = c.packed.empty() ? 0 : offsets[size_t(n)];
    const int64_t end = c.packed.empty() ? c.s : offsets[size_t(n) + 1];
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t hs = h / (heads / c.hs);
      const double lambda = std::exp(-double{slopes[size_t(hs)]});
      const auto at = static_cast<size_t>((n * c.hs + hs) * d * e);
      std::vector<double> S(static_cast<size_t>(d * e), 0);
      if (c.initial) std::copy_n(initial.begin() + static_cast<int64_t>(at), d * e, S.begin());
      Error out_error, state_error;
      for (int64_t t = begin; t < end; ++t) {
        std::vector<double> row(static_cast<size_t>(e), 0);
        for (int64_t i = 0; i < d; ++i)
          for (int64_t f = 0; f < e; ++f) {
            double& cell = S[static_cast<size_t>(i * e + f)];
            cell = lambda * cell +
                   k.value(b, t, h / (heads / c.hk), i) * v.value(b, t, h / (heads / c.hv), f);
            row[size_t(f)] += 0.7f * q.value(b, t, h / (heads / c.hq), i) * cell;
          }
        for (int64_t f = 0; f < e; ++f) out_error.add(out.value(b, t, h, f), row[size_t(f)]);
      }
      for (int64_t i = 0; c.state && i < d * e; ++i)
        state_error.add(state[at + static_cast<size_t>(i)], S[static_cast<size_t>(i)]);
      worst = std::max(worst, out_error.relative() / (kType == DType::kBF16 ? 5e-3 : 1e-3));
      worst = std::max(worst, state_error.relative() / 1e-5);
    }
  }
  // nothing beside what exists was written
  if (!out.untouched_behind()) worst = INFINITY;
  if (!std::isnan(state.back())) worst = INFINITY;
  return worst;
}

#if HEDDLE_D <= 128 && HEDDLE_E == 64
const Case kCases[] = {
    {.b = 2, .s = 200, .initial = true, .state = true, .segment = 128, .parts = 2},
    // segments that see a part of the one before, or not all segments
    {.b = 1,
     .s = 350,
     .hq = 2,
     .hk = 2,
     .hv = 2,
     .hs = 2,
     .initial = true,
     .segment = 128,
     .parts = 2,
     .slope = 0.6f},
    {.b = 1, .s = 300, .initial = true, .state = true, .segment = 64, .slope = 0.3f},
    {.b = 1, .s = 1, .state = true},
    {.b = 1, .s = 1000, .state = true},
    {.b = 1, .s = 128, .hq = 2, .initial = true, .state = true},
    {.b = 1, .s = 70, .hv = 2, .hs = 2, .narrower = 24, .slices = 2},
    {.b = 1, .s = 168, .initial = true, .state = true, .segment = 64, .packed = {0, 1, 130, 32, 5}},
};
#else
// wider kernels differ in sizes alone
const Case kCases[] = {
    {.b = 1, .s = 140, .initial = true, .state = true, .segment = 64, .narrower = 8},
    {.b = 1, .s = 450},
    {.b = 1, .s = 335, .initial = true, .state = true, .packed = {0, 1, 329, 5}},
};
#endif

}  // namespace
}  // namespace heddle

int main(int argc, char** argv) {
  using namespace heddle;
  return emulator::run_cases(kCases, argc, argv, check);
}
