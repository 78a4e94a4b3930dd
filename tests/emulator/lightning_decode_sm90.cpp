// The decode steps of lightning attention on the emulator, against the recurrence in float64
#include "lightning/decode_sm90.cuh"

#include "lightning_check.h"

namespace heddle {
namespace {

#ifndef HEDDLE_DTYPE
#define HEDDLE_DTYPE kBF16
#endif
constexpr DType kType = DType::HEDDLE_DTYPE;

struct Case {
  int64_t b, s, heads, hk, hs, d, e;
  bool transposed, all_states;
  int processors;
};

double check(const Case& c, emulator::Random& random) {
  const int64_t pool = c.b + 2, size = c.d * c.e;
  Array q(kType, {c.b, c.s, c.heads, c.d}, true), k(kType, {c.b, c.s, c.hk, c.d}, true),
      v(kType, {c.b, c.s, c.hk, c.e}, true), out(kType, {c.b, c.s, c.heads, c.e}, false);
  q.draw(random, 1);
  k.draw(random, 0.3f);
  v.draw(random, 1);
  std::vector<float> slopes, memory(static_cast<size_t>(pool * c.hs * size + 4)),
      all(static_cast<size_t>(c.b * c.s * c.hs * size + 4), NAN);
  float* states = memory.data();
  while (reinterpret_cast<uintptr_t>(states) % 16 != 0) ++states;
  float* all_states = all.data();
  while (reinterpret_cast<uintptr_t>(all_states) % 16 != 0) ++all_states;
  for (int64_t h = 0; h < c.hs; ++h) slopes.push_back(draw_slope(random, false));
  for (float& x : memory) x = normal(random);
  // two slots that nobody uses and one row that is skipped
  std::vector<int32_t> slots;
  for (int64_t i = 0; i < c.b; ++i) slots.push_back(static_cast<int32_t>(i + 2));
  for (size_t i = slots.size(); i > 1; --i)
    std::swap(slots[i - 1], slots[static_cast<size_t>(random.below(static_cast<int>(i)))]);
  if (c.b > 2) slots[1] = -1;
  const std::vector<float> before(memory);
  int fault = 7;

  DecodeCall call{};
  call.dtype = kType;
  const auto rows = [](Array& x) {
    return DecodeRows{x.data(), {x.strides.batch, x.strides.row, x.strides.head, 1}};
  };
  call.q = rows(q);
  call.k = rows(k);
  call.v = rows(v);
  call.slopes = slopes.data();
  call.slopes_stride = 1;
  call.states = states;
  call.slots = slots.data();
  call.slots_stride = 1;
  call.batch = c.b;
  call.pool = pool;
  call.out = out.data();
  call.all_states = c.all_states ? all_states : nullptr;
  call.heads_q = call.heads = static_cast<int>(c.heads);
  call.heads_k = call.heads_v = static_cast<int>(c.hk);
  call.heads_state = static_cast<int>(c.hs);
  call.tokens = static_cast<int>(c.s);
  call.d = static_cast<int>(c.d);
  call.e = static_cast<int>(c.e);
  call.scale = 0.7f;
  call.transposed = c.transposed;
  call.vectors = true;
  call.fault = &fault;
  call.processors = c.processors;
  c.transposed ? launch_decode_sm90<kType, true>(call, nullptr)
               : launch_decode_sm90<kType, false>(call, nullptr);

  Error outputs, updated, kept;
  const auto at = [&](int64_t i, int64_t j) { return c.transposed ? j * c.d + i : i * c.e + j; };
  const auto offset = static_cast<size_t>(states - memory.data());
  std::vector<float> expected(before);
  std::vector<double> state(static_cast<size_t>(size));
  for (int64_t b = 0; b < c.b; ++b)
    for (int64_t h = 0; h < c.hs; ++h) {
      const bool skipped = slots[static_cast<size_t>(b)] < 0;
      const int64_t place = (slots[static_cast<size_t>(b)] * c.hs + h) * size;
      for (int64_t i = 0; i < size; ++i)
        state[static_cast<size_t>(i)] =
            skipped ? 0 : double{before[offset + static_cast<size_t>(place + i)]};
      const double decay = std::exp(-double{slopes[static_cast<size_t>(h)]});
      const int64_t group = c.heads / c.hs;
      for (int64_t t = 0; t < c.s; ++t) {
        const int64_t key_head = h * group / (c.heads / c.hk);
        for (int64_t i = 0; !skipped && i < c.d; ++i)
          for (int64_t j = 0; j < c.e; ++j) {
            double& x = state[static_cast<size_t>(at(i, j))];
            x = decay * x + k.value(b, t, key_head, i) * v.value(b, t, key_head, j);
          }
        for (int64_t i = 0; c.all_states && i < size; ++i)
          kept.add(all_states[((b * c.s + t) * c.hs + h) * size + i],
                   state[static_cast<size_t>(i)]);
        for (int64_t member = 0; member < group; ++member)
          for (int64_t j = 0; j < c.e; ++j) {
            double sum = 0;
            for (int64_t i = 0; i < c.d; ++i)
              sum += q.value(b, t, h * group + member, i) * state[static_cast<size_t>(at(i, j))];
            outputs.add(out.value(b, t, h * group + member, j), 0.7 * sum);
          }
      }
      for (int64_t i = 0; !skipped && i < size; ++i)
        expected[offset + static_cast<size_t>(place + i)] =
            static_cast<float>(state[static_cast<size_t>(i)]);
    }
  for (size_t i = 0; i < memory.size(); ++i) updated.add(memory[i], expected[i]);
  const double rounding = kType == DType::kBF16 ? 0x1p-8 : 0x1p-11;
  double worst = std::max({outputs.relative() / rounding, updated.relative() / 1e-6,
                           c.all_states ? kept.relative() / 1e-6 : 0.});
  if (fault != 0 || !out.untouched_behind()) worst = INFINITY;
  return worst;
}

constexpr Case kCases[] = {
    // with one state per head, and as many states as fit ahead
    {3, 1, 2, 2, 2, 128, 128, false, false, 1},
    {5, 1, 1, 1, 1, 128, 128, true, false, 2},
    {9, 1, 3, 3, 3, 32, 16, false, true, 1},
    // tokens of which each has its state, query heads that share it, odd sizes
    {3, 3, 4, 2, 2, 72, 104, false, true, 2},
    {3, 4, 4, 4, 2, 104, 72, true, true, 1},
    {4, 2, 2, 1, 2, 64, 64, true, false, 3},
    {2, 1, 1, 1, 1, 8, 4, false, false, 4},
};

}  // namespace
}  // namespace heddle

int main(int argc, char** argv) {
  using namespace heddle;
  return emulator::run_cases(kCases, argc, argv, check);
}
