// What FlexPrefill decides between its walks, against sums over all keys
#include "flexprefill/decide.cuh"

#include <cstring>
#include <deque>

#include "cpu/team.h"
#include "probe/means.cuh"
#include "tensor.h"

namespace heddle {
namespace {

struct Case {
  int64_t b, sq, sk, hq, hk, d;
  int parts;
  double peak = 1;        // of weights
  bool poisoned = false;  // one is no number
  int steps = 1;
};

// Few blocks and several CTAs of them, blocks that sequences end in, queries behind a prefix
const Case kCases[] = {
    {1, 128, 128, 1, 1, 64, 1},
    {1, 700, 700, 4, 2, 128, 3, 9},
    {2, 300, 5000, 2, 1, 64, 2, 40},
    {1, 8192, 8192, 2, 2, 128, 5, 1, false, 3},
    {1, 4200, 4200, 3, 1, 64, 11, 1},
    {1, 600, 900, 2, 1, 128, 1, 1, true},
    {1, 128, 132000, 1, 1, 64, 9, 3, false, 7},
};

double check(const Case& c, emulator::Random& random) {
  const auto size = [](int64_t n) { return static_cast<size_t>(n); };
  const auto uniform = [&] { return random.below(1 << 20) * 0x1p-20; };
  FlexPrefill op;
  op.q = tensor(nullptr, {c.b, c.sq, c.hq, c.d});
  op.k = tensor(nullptr, {c.b, c.sk, c.hk, c.d});
  op.tau = 0.2;
  op.gamma = 0.9;
  const int64_t heads = c.b * c.hq, nk = op.columns(), block = 128;
  std::vector<float> divergence(size(heads), NAN), expected(divergence);
  op.divergence = tensor(divergence.data(), {c.b, c.hq});
  std::deque<std::vector<float>> memory;
  const auto allocate = [&](int64_t n) { return memory.emplace_back(size(n), NAN).data(); };
  FlexTask task(op, allocate);
  task.set_apart(allocate);

  // Means as planes
  std::deque<std::vector<uint16_t>> planes;
  std::vector<float> means[2];
  const auto make = [&](int which, const Tensor& x) {
    MeanArgs args{x, block, c.d};
    args.apart = args.count() * c.d;
    auto& own = planes.emplace_back(size(args.apart * kMeanPlanes + 8));
    size_t shift = 0;
    while (reinterpret_cast<uintptr_t>(&own[shift]) % 16 != 0) ++shift;
    args.planes = &own[shift];
    for (int64_t i = 0; i < args.apart; ++i) {
      means[which].push_back(static_cast<float>(2 * uniform() - 1));
      store_mean(args, i, means[which].back());
    }
    return args;
  };
  Tensor last = op.q;
  last.shape[1] = block;
  const MeanArgs mean_k = make(0, op.k), mean_last = make(1, last);

  // Weights of the last queries, whose parts have maxima of their own
  std::vector<float> bands(size(heads * nk * 256));
  std::vector<float2> stats(size(heads * c.parts * 128));
  std::vector<double> vertical(size(heads * nk)), slash(size(heads * nk));
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t i = 0; i < 128; ++i) {
      std::vector<double> weights(size(nk * 2));
      double sum = 0;
      for (int64_t at = 0; at < nk * 2; ++at) {
        const int64_t t = at / 2, side = at % 2;
        // nothing is ahead of the newest key
        const bool none = side == 1 && (t == nk - 1 || i == 127);
        double& weight = weights[size(at)];
        weight = none || random.below(9) == 0 ? 0 : std::exp(c.peak * uniform());
        if (at == 0) weight = 1;
        sum += weight;
        const double shown = c.poisoned && head == 0 && i == 5 && t == 2 ? NAN : weight;
        bands[size(((head * nk + t) * 128 + i) * 2 + side)] =
            static_cast<float>(std::log2(shown) + 20);
      }
      for (int64_t at = 0; at < nk * 2; ++at) {
        const int64_t t = at / 2, o = nk - 1 - t - at % 2;
        vertical[size(head * nk + t)] += weights[size(at)] / sum / 128;
        if (o >= 0) slash[size(head * nk + o)] += weights[size(at)] / sum / 128;
      }
      for (int64_t part = 0; part < c.parts; ++part) {
        const double top = 20 - static_cast<double>(random.below(30));
        stats[size((head * c.parts + part) * 128 + i)] = {
            static_cast<float>(top), static_cast<float>(sum * std::exp2(20 - top) / c.parts)};
      }
    }

  std::vector<int32_t> kinds(size(heads), -1);
  std::vector<float> halves(size(heads * 2 * nk), NAN);
  std::vector<int> arrivals(size(heads));
  std::vector<int> signals(300, 5);
  const float scale = 0.3f;
  const DecideArgs args{task,      stats.data(), c.parts,       bands.data(),    mean_k,
                        mean_last, kinds.data(), halves.data(), arrivals.data(), signals.data(),
                        300,       scale,        c.steps};
  const int64_t ctas = args.ctas_of_head();
  std::vector<DecideShared> shared(size(heads * ctas));
  emulator::launch(static_cast<int>(heads * ctas), kDecideThreads, 0, [&] {
    flexprefill_decide_cta(args, ctas, blockIdx.x, shared[size(blockIdx.x)]);
  });

  double worst = 0;
  const auto compare = [&](double actual, double wanted) {
    const double error = std::fabs(actual - wanted) / (0x1p-16 * wanted + 0x1p-40);
    worst = error <= worst ? worst : std::isnan(error) ? INFINITY : error;
  };
  for (int x : arrivals)
    if (x != 0) worst = INFINITY;
  for (int x : signals)
    if (x != 0) worst = INFINITY;
  for (int64_t head = 0; head < heads; ++head) {
    if (c.poisoned && head == 0) {
      if (kinds[0] != kFlexAll) worst = INFINITY;
      continue;
    }
    std::vector<double> estimate(size(nk));
    double sum = 0;
    for (int64_t t = 0; t < nk; ++t) {
      double dot = 0;
      for (int64_t e = 0; e < c.d; ++e)
        dot += static_cast<double>(means[1][size(head * c.d + e)]) *
               means[0][size((head / (c.hq / c.hk) * nk + t) * c.d + e)];
      sum += estimate[size(t)] = std::exp(dot * static_cast<double>(scale));
    }
    double js = 0;
    for (int64_t t = 0; t < nk; ++t) {
      const double a = estimate[size(t)] / sum, v = vertical[size(head * nk + t)], m = (a + v) / 2;
      compare(task.estimate[head * nk + t], a);
      compare(task.work[head * 3 * (nk + 1) + t], v);
      compare(task.work[head * 3 * (nk + 1) + nk + 1 + t], slash[size(head * nk + t)]);
      js += (a * std::log(a / m) + v * std::log(v / m)) / 2;
    }
    const double distance = std::sqrt(std::fmax(js, 0));
    if (!(std::fabs(divergence[size(head)] - distance) < 2e-3)) worst = INFINITY;
    const int32_t kind = divergence[size(head)] < 0.2f ? kFlexAware : kFlexLines;
    if (kinds[size(head)] != kind) worst = INFINITY;
  }
  return worst;
}

}  // namespace
}  // namespace heddle

int main(int argc, char** argv) {
  return heddle::emulator::run_cases(heddle::kCases, argc, argv, heddle::check);
}
