// Decode steps of lightning attention on the emulator, on Hopper and on any GPU, against the
// recurrence in float64
#ifndef HEDDLE_PORTABLE
#define HEDDLE_PORTABLE false
#endif
#if HEDDLE_PORTABLE
#include "common/launch.h"
#include "lightning/decode_portable.cuh"
#else
#include "lightning/decode_sm90.cuh"
#endif

#include <cmath>
#include <vector>

#include "variant.h"

namespace heddle {
namespace {

using T = Element<kType>;

struct Case {
  int64_t b, heads, hq, hk, hv, hs;  // heads: of out
  bool transposed;
  int64_t tokens = 1, d = 128, e = 128;
  bool all = false;  // states of every token are asked for
};

// States, of which the first and the last are nobody's; -1 and what is behind them are no slots
constexpr int kPool = 5, kSlots[] = {3, -1, 1};

double check(const Case& c, emulator::Random& random) {
  const auto size = [](int64_t n) { return static_cast<size_t>(n); };
  const int64_t state_size = c.d * c.e;
  const auto normal = [&] { return static_cast<float>(random.below(4096)) / 1024 - 2; };
  std::vector<float> states(size(kPool * c.hs * state_size + 4)), slopes;
  float* pool = states.data();
  while (reinterpret_cast<uintptr_t>(pool) % 16 != 0) ++pool;
  for (float& x : states) x = normal();
  const std::vector<float> before = states;
  for (int64_t h = 0; h < c.hs; ++h) slopes.push_back(0.2f * static_cast<float>(h));
  // a token and a head that are no numbers lie between those that are
  struct Rows {
    int64_t heads, width;
    std::vector<T> values;
    DecodeRows rows;
  };
  const auto draw = [&](int64_t heads, int64_t width) {
    Rows x{heads, width, std::vector<T>(size(c.b * (c.tokens + 1) * (heads + 1) * width)), {}};
    for (T& value : x.values) value = from_float<T>(NAN);
    const int64_t row = (heads + 1) * width;
    for (int64_t i = 0; i < c.b * c.tokens * heads * width; ++i)
      x.values[size(i / width / heads / c.tokens * (c.tokens + 1) * row +
                    i / width / heads % c.tokens * row + i / width % heads * width + i % width)] =
          from_float<T>(normal());
    x.rows = {nullptr, {(c.tokens + 1) * row, row, width, 1}, static_cast<int>(c.heads / heads)};
    return x;
  };
  Rows q = draw(c.hq, c.d), k = draw(c.hk, c.d), v = draw(c.hv, c.e);
  std::vector<int32_t> slots;
  for (int64_t b = 0; b < c.b; ++b) slots.push_back(kSlots[b % 3]);
  std::vector<T> out(size(c.b * c.tokens * c.heads * c.e + 1), from_float<T>(NAN));
  std::vector<float> all(size(c.b * c.tokens * c.hs * state_size + 4), NAN);
  float* all_states = all.data();
  while (reinterpret_cast<uintptr_t>(all_states) % 16 != 0) ++all_states;
  int fault = -1;

  DecodeCall call{};
  for (auto [to, from] : {std::pair{&call.q, &q}, {&call.k, &k}, {&call.v, &v}}) {
    *to = from->rows;
    to->data = from->values.data();
  }
  call.slopes = slopes.data();
  call.slopes_stride = 1;
  call.states = pool;
  call.slots = slots.data();
  call.slots_stride = 1;
  call.batch = c.b;
  call.pool = kPool;
  call.out = out.data();
  call.all_states = c.all ? all_states : nullptr;
  call.heads = static_cast<int>(c.heads);
  call.heads_state = static_cast<int>(c.hs);
  call.tokens = static_cast<int>(c.tokens);
  call.d = static_cast<int>(c.d);
  call.e = static_cast<int>(c.e);
  call.scale = 0.7f;
  call.transposed = c.transposed;
  call.vectors = (c.transposed ? c.d : c.e) % 4 == 0;
  call.fault = &fault;
#if HEDDLE_PORTABLE
  const auto ctas = static_cast<unsigned>(c.b * c.hs * ((c.e + kDecodeSlab - 1) / kDecodeSlab));
  const auto run = [&]<int kPieces, bool kVectors>() {
    launch_grid(c.transposed ? lightning_decode_kernel<T, kPieces, true, kVectors>
                             : lightning_decode_kernel<T, kPieces, false, kVectors>,
                ctas, kTileThreads, 0, nullptr, call);
  };
  !call.vectors ? run.template operator()<16, false>()
  : c.d <= 128  ? run.template operator()<8, true>()
                : run.template operator()<16, true>();
#else
  launch_decode_sm90<T>(call, nullptr);
#endif

  double worst = fault == 0 ? 0 : INFINITY;
  const auto judge = [&](double actual, double expected, double allowed) {
    const double error = std::fabs(actual - expected) / allowed;
    worst = error <= worst ? worst : std::isnan(error) ? INFINITY : error;
  };
  const auto value = [&](const Rows& x, int64_t b, int64_t t, int64_t head, int64_t i) {
    return double{to_float(x.values[size(x.rows.offset(b, t, static_cast<int>(head), i))])};
  };
  std::vector<double> expected(before.begin(), before.end());
  double* S = expected.data() + (pool - states.data());
  const int64_t group = c.heads / c.hs;
  for (int64_t b = 0; b < c.b; ++b)
    for (int64_t h = 0; h < c.hs; ++h)
      for (int64_t t = 0; t < c.tokens; ++t) {
        double* own = slots[size(b)] < 0 ? nullptr : S + (slots[size(b)] * c.hs + h) * state_size;
        const auto at = [&](int64_t i, int64_t f) {
          return c.transposed ? f * c.d + i : i * c.e + f;
        };
        for (int64_t i = 0; own && i < c.d; ++i)
          for (int64_t f = 0; f < c.e; ++f)
            own[at(i, f)] = std::exp(-double{slopes[size(h)]}) * own[at(i, f)] +
                            value(k, b, t, h * group, i) * value(v, b, t, h * group, f);
        for (int64_t i = 0; c.all && own && i < state_size; ++i)
          judge(all_states[((b * c.tokens + t) * c.hs + h) * state_size + i], own[i], 1e-4);
        for (int64_t head = h * group; head < (h + 1) * group; ++head)
          for (int64_t f = 0; f < c.e; ++f) {
            double sum = 0, terms = 0;
            for (int64_t i = 0; own && i < c.d; ++i) {
              const double term = 0.7f * value(q, b, t, head, i) * own[at(i, f)];
              sum += term;
              terms += std::fabs(term);
            }
            judge(
                to_float(out[size(((b * c.tokens + t) * c.heads + head) * c.e + f)]), sum,
                (kType == DType::kBF16 ? 0x1p-7 : 0x1p-10) * std::fabs(sum) + 1e-6 * terms + 1e-9);
          }
      }
  for (size_t i = 0; i < states.size(); ++i) judge(states[i], expected[i], 1e-4);
  return std::isnan(to_float(out.back())) ? worst : INFINITY;
}

#if HEDDLE_PORTABLE
// Sizes that pieces and columns end in, of more than one pass, several tokens and shared heads
const Case kCases[] = {
    {1, 1, 1, 1, 1, 1, false},
    {2, 1, 1, 1, 1, 1, true, 1, 128, 100},
    {3, 4, 4, 2, 2, 2, false, 3, 40, 72, true},
    {3, 2, 1, 1, 2, 2, true, 2, 72, 40, true},
    {1, 2, 2, 1, 1, 2, false, 2, 200, 8},
    {1, 1, 1, 1, 1, 1, true, 1, 200, 72},
    {1, 1, 1, 1, 1, 1, false, 2, 129, 66},
    {1, 2, 2, 2, 2, 2, true, 1, 33, 5, true},
};
#else
const Case kCases[] = {
    {1, 1, 1, 1, 1, 1, false}, {3, 3, 3, 3, 3, 3, false}, {3, 2, 2, 2, 2, 2, true}};
#endif

}  // namespace
}  // namespace heddle

int main(int argc, char** argv) {
  return heddle::emulator::run_cases(heddle::kCases, argc, argv, heddle::check);
}
