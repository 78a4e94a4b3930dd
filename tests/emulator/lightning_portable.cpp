// The portable scan on the emulator, forward and backward in time, against the recurrence in
// float64
#include "emulator.h"
#include "lightning_check.h"

namespace heddle {
namespace {

thread_local float smem[58112]{};  // what the kernel declares

}  // namespace
}  // namespace heddle

#include "lightning/scan_portable.cuh"
#include "variant.h"

namespace heddle {
namespace {

using T = Element<kType>;

struct Case {
  bool reverse;
  int64_t b, s, hq, hk, hv, hs, d, e;
  bool initial = false, state = false;
  std::vector<int64_t> packed = {};  // lengths for cuSeqlens
};

Tensor tensor(Array& x) {
  Tensor made;
  made.rank = 4;
  made.dtype = kType;
  made.data = x.data();
  const int64_t shape[] = {x.shape.b, x.shape.s, x.shape.h, x.shape.d};
  const int64_t strides[] = {x.strides.batch, x.strides.row, x.strides.head, 1};
  std::copy_n(shape, 4, made.shape);
  std::copy_n(strides, 4, made.strides);
  return made;
}

double check(const Case& c, emulator::Random& random) {
  const int64_t heads = std::max(c.hq, c.hv), size = c.d * c.e;
  const auto sequences = c.packed.empty() ? c.b : static_cast<int64_t>(c.packed.size());
  Array q(kType, {c.b, c.s, c.hq, c.d}, true), k(kType, {c.b, c.s, c.hk, c.d}, true),
      v(kType, {c.b, c.s, c.hv, c.e}, true), out(kType, {c.b, c.s, heads, c.e}, false);
  q.draw(random, 1);
  k.draw(random, 0.3f);
  v.draw(random, 1);
  std::vector<int32_t> offsets{0};
  for (const int64_t length : c.packed)
    offsets.push_back(offsets.back() + static_cast<int32_t>(length));
  const int64_t states = c.reverse ? heads : c.hs;
  std::vector<float> slopes, initial,
      state(static_cast<size_t>(sequences * states * size + 1), NAN);
  for (int64_t h = 0; h < c.hs; ++h) slopes.push_back(draw_slope(random, false));
  for (int64_t i = 0; i < sequences * c.hs * size; ++i) initial.push_back(normal(random));
  int fault = 0;

  PortableArgs args{Strided(tensor(q)), Strided(tensor(k)), Strided(tensor(v))};
  args.slopes = slopes.data();
  args.slopes_stride = 1;
  args.cu_seqlens = c.packed.empty() ? nullptr : offsets.data();
  args.cu_stride = 1;
  args.has_initial = c.initial;
  args.initial_state.data = reinterpret_cast<char*>(initial.data());
  const int64_t strides[4] = {c.hs * size, size, c.e, 1};
  std::copy_n(strides, 4, args.initial_state.strides);
  args.out = out.data();
  args.state = c.state ? state.data() : nullptr;
  args.tokens = c.s;
  args.sequences = sequences;
  args.heads_q = static_cast<int>(c.hq);
  args.heads_k = static_cast<int>(c.hk);
  args.heads_v = static_cast<int>(c.hv);
  args.heads = static_cast<int>(heads);
  args.heads_state = static_cast<int>(c.hs);
  args.d = static_cast<int>(c.d);
  args.e = static_cast<int>(c.e);
  args.scale = 0.7f;
  args.fault = &fault;
  std::fill(std::begin(smem), std::end(smem), NAN);
  CudaContext context;
  c.reverse ? launch_scan<T, T, true>(args, context) : launch_scan<T, T, false>(args, context);

  double worst = fault ? INFINITY : 0;
  for (int64_t n = 0; n < sequences; ++n)
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t b = c.packed.empty() ? n : 0, hs = h / (heads / c.hs);
      const int64_t begin = c.packed.empty() ? 0 : offsets[size_t(n)];
      const int64_t end = c.packed.empty() ? c.s : offsets[size_t(n) + 1];
      const double lambda = std::exp(-double{slopes[size_t(hs)]});
      std::vector<double> S(static_cast<size_t>(size), 0);
      // heads that share a state have its gradient once
      if (c.initial && (!c.reverse || h % (heads / c.hs) == 0))
        std::copy_n(initial.begin() + (n * c.hs + hs) * size, size, S.begin());
      Error out_error, state_error;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t t = c.reverse ? end - 1 - (i - begin) : i;
        std::vector<double> row(static_cast<size_t>(c.e), 0);
        for (int64_t x = 0; x < c.d; ++x)
          for (int64_t f = 0; f < c.e; ++f) {
            double& cell = S[static_cast<size_t>(x * c.e + f)];
            const double own =
                k.value(b, t, h / (heads / c.hk), x) * v.value(b, t, h / (heads / c.hv), f);
            cell = c.reverse ? cell + 0.7f * own : lambda * cell + own;
            row[size_t(f)] += (c.reverse ? 1 : 0.7f) * q.value(b, t, h / (heads / c.hq), x) * cell;
            if (c.reverse) cell *= lambda;
          }
        for (int64_t f = 0; f < c.e; ++f) out_error.add(out.value(b, t, h, f), row[size_t(f)]);
      }
      const int64_t at = (c.reverse ? n * heads + h : n * c.hs + hs) * size;
      for (int64_t i = 0; c.state && i < size; ++i)
        // what underflows in f32 is zero
        state_error.add(state[static_cast<size_t>(at + i)],
                        static_cast<float>(S[static_cast<size_t>(i)]));
      worst = std::max({worst, out_error.relative() / (kType == DType::kBF16 ? 3e-3 : 4e-4),
                        state_error.relative() / 1e-5});
    }
  // nothing beside what exists was written
  return out.untouched_behind() && std::isnan(state.back()) ? worst : INFINITY;
}

// Chunks of 32 and of 16 tokens that sequences end in, columns that tiles of 32 end in, shared
// heads of each kind
const Case kCases[] = {
    {false, 1, 1, 1, 1, 1, 1, 8, 8, false, true},
    {false, 2, 70, 1, 1, 1, 1, 24, 40, true, true},
    {false, 1, 33, 4, 2, 2, 2, 16, 32, true, true},
    {false, 1, 64, 1, 1, 2, 2, 136, 8, true, true},
    {false, 1, 140, 2, 1, 1, 2, 8, 40, true, true, {0, 1, 97, 32, 10}},
    {true, 1, 1, 1, 1, 1, 1, 8, 8, true, true},
    {true, 2, 70, 1, 1, 1, 1, 24, 40, true, true},
    {true, 1, 33, 4, 2, 2, 2, 16, 32, true, true},
    {true, 1, 40, 2, 2, 2, 1, 136, 8, true, true},
    {true, 1, 140, 2, 1, 1, 2, 8, 40, false, true, {0, 1, 97, 32, 10}},
};

}  // namespace
}  // namespace heddle

int main(int argc, char** argv) {
  return heddle::emulator::run_cases(heddle::kCases, argc, argv, heddle::check);
}
