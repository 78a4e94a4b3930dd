// Masses of lines on the emulator, against float64
#include "probe/lines_sm90.cuh"

#include <cmath>
#include <vector>

#include "random_rows.h"

namespace heddle {
namespace {

struct Case {
  int64_t b, sq, sk, hq, hk;
  int processors;
  double scale = 0.2;
  double slope = 0;       // keys grow, or shrink, by so much from the first to the last
  double offset = 0;      // they have in common
  int64_t poisoned = -1;  // a key that is no number
  int64_t block = 0;      // whose means are asked for
  int64_t others = 0;     // a bit for each head that the second walk is not for
  bool bands = false;     // whether bands are asked for
  bool later = false;     // whether blocks of those are averaged in it
};

// Heads in pairs and alone, strips that end before or after the keys, rows that see one key
const Case kCases[] = {
    {.b = 1, .sq = 128, .sk = 700, .hq = 4, .hk = 2, .processors = 5, .block = 128, .bands = true},
    {.b = 1,
     .sq = 128,
     .sk = 512,
     .hq = 4,
     .hk = 2,
     .processors = 4,
     .block = 128,
     .others = 0xb,
     .bands = true,
     .later = true},
    {.b = 2,
     .sq = 128,
     .sk = 129,
     .hq = 1,
     .hk = 1,
     .processors = 2,
     .block = 128,
     .others = 1,
     .bands = true,
     .later = true},
    // so many blocks that heads are averaged beside each other
    {.b = 1, .sq = 100, .sk = 600, .hq = 4, .hk = 4, .processors = 3, .block = 2},
    {.b = 1,
     .sq = 128,
     .sk = 300,
     .hq = 8,
     .hk = 2,
     .processors = 2,
     .block = 1,
     .others = 0xf0,
     .bands = true,
     .later = true},
    {.b = 2, .sq = 100, .sk = 457, .hq = 2, .hk = 2, .processors = 3, .block = 48},
    {.b = 1, .sq = 33, .sk = 33, .hq = 1, .hk = 1, .processors = 9, .block = 128},
    {.b = 2, .sq = 1, .sk = 300, .hq = 2, .hk = 1, .processors = 2},
    {.b = 1, .sq = 128, .sk = 1500, .hq = 3, .hk = 1, .processors = 6, .scale = -0.2},
    {.b = 1,
     .sq = 128,
     .sk = 1300,
     .hq = 2,
     .hk = 1,
     .processors = 1,
     .scale = 2,
     .slope = 8,
     .bands = true},
    {.b = 1, .sq = 70, .sk = 1300, .hq = 2, .hk = 1, .processors = 2, .scale = 2, .slope = -8},
    {.b = 1, .sq = 128, .sk = 300, .hq = 1, .hk = 1, .processors = 2, .scale = 2, .offset = 10},
    {.b = 1, .sq = 128, .sk = 520, .hq = 4, .hk = 2, .processors = 3, .poisoned = 519},
};

double check(const Case& c, emulator::Random& random) {
  Rows q(c.b, c.sq, c.hq, random), k(c.b, c.sk, c.hk, random, c.slope, c.offset);
  if (c.poisoned >= 0)
    std::fill_n(k.tensor.as<uint16_t>() + c.poisoned * k.tensor.strides[1], kD, 0x7fff);
  const int64_t heads = c.b * c.hq;
  const auto size = [](int64_t n) { return static_cast<size_t>(n); };
  std::vector<float> score(size(heads * 2 * c.sk + 1), NAN);
  Probe op;
  op.q = q.tensor;
  op.k = k.tensor;
  op.score.data = score.data();
  op.scale = c.scale;
  const LinesPlan first(op, c.processors,
                        c.block > 0 ? (q.tensor.size() + k.tensor.size()) * 2 : 0),
      second(op, c.processors);
  std::vector<float2> stats(size(heads * first.parts * 128), {NAN, NAN});
  const int64_t strips = second.parts * int64_t{8}, tiles = (c.sk + 127) / 128;
  std::vector<float> distances(size(heads * strips * (second.strip + 128)), NAN),
      bands(size(heads * tiles * 256), NAN);
  std::vector<int32_t> kinds;
  for (int64_t head = 0; head < heads; ++head)
    kinds.push_back((c.others >> head & 1) == 0 ? 0 : head == 1 ? 2 : 1);
  const int64_t groups = (c.sq + 128 * 128 - 1) / (128 * 128);
  std::vector<int> signals(size(1 + heads * groups));
  LinesCall call{op, first, second, stats.data(), {distances.data(), second.strip, strips}, {}};
  if (c.bands) call.bands = bands.data();
  std::vector<float> means[2];
  for (const bool of_k : {false, true}) {
    if (c.block == 0) continue;
    MeanArgs& args = c.later && !of_k ? call.later : call.means[of_k];
    args = {of_k ? k.tensor : q.tensor, c.block, kD};
    means[of_k].assign(size(args.count() * kD), NAN);
    args.mean = means[of_k].data();
  }
  launch_stats_sm90<kType, kD>(call, nullptr);
  if (c.others) {
    call.kinds = kinds.data();
    call.next = signals.data();
    call.ready = signals.data() + 1;
    call.spares = c.later;
  }
  launch_lines_sm90<kType, kD>(call, nullptr);

  double worst = 0;
  for (int64_t head = 0; c.later && head < heads; ++head)
    if (kinds[size(head)] == 1 && signals[size(1 + head)] != (c.sq + c.block - 1) / c.block)
      worst = INFINITY;
  for (const bool of_k : {false, true})
    for (size_t at = 0; at < means[of_k].size(); ++at) {
      const Rows& x = of_k ? k : q;
      const int64_t rows = x.tensor.shape[1], heads = x.tensor.shape[2],
                    blocks = (rows + c.block - 1) / c.block;
      const auto number = static_cast<int64_t>(at) / kD, first = number % blocks * c.block,
                 end = std::min(first + c.block, rows);
      if (c.later && !of_k && kinds[size(number / blocks)] != 1) continue;
      double sum = 0;
      for (int64_t s = first; s < end; ++s)
        sum += x.value(number / blocks / heads, s, number / blocks % heads,
                       static_cast<int64_t>(at) % kD);
      const double error = std::fabs(means[of_k][at] - sum / static_cast<double>(end - first));
      worst = error * 0x1p18 <= worst ? worst : std::isnan(error) ? INFINITY : error * 0x1p18;
    }
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t b = head / c.hq, h = head % c.hq;
    std::vector<double> keys(size(c.sk)), far(size(c.sk));
    const auto compare = [&](double actual, double expected) {
      if (std::isnan(actual) && std::isnan(expected)) return;
      // what a product loses grows with it
      const double error =
          std::fabs(actual - expected) / (0x1p-12 * (1 + c.offset / 4) * expected + 0x1p-30);
      worst = error <= worst ? worst : std::isnan(error) ? INFINITY : error;
    };
    for (int64_t i = 0; i < c.sq; ++i) {
      const int64_t p = c.sk - c.sq + i;
      std::vector<double> row(size(p + 1));
      double top = -INFINITY, sum = 0;
      for (int64_t t = 0; t <= p; ++t) {
        double dot = 0;
        for (int64_t e = 0; e < kD; ++e)
          dot += q.value(b, i, h, e) * k.value(b, t, h / (c.hq / c.hk), e);
        row[size(t)] = dot * c.scale;
        top = std::fmax(top, dot * c.scale);
      }
      for (double& x : row) sum += x = std::exp(x - top);
      for (int64_t tile = 0; c.bands && tile < tiles; ++tile)
        for (int64_t side = 0; side < 2; ++side) {
          double mass = 0;
          for (int64_t t = tile * 128; t < tile * 128 + 128 && t <= p; ++t)
            if (t % 128 > i == side) mass += row[size(t)] / sum;
          const double lse = top * 1.4426950408889634 + std::log2(sum);
          compare(std::exp2(bands[size(((head * tiles + tile) * 128 + i) * 2 + side)] - lse), mass);
        }
      for (int64_t t = 0; t <= p; ++t) {
        keys[size(t)] += row[size(t)] / sum / static_cast<double>(c.sq);
        far[size(p - t)] += row[size(t)] / sum / static_cast<double>(c.sq);
      }
    }
    // Two heads of a CTA are walked over for either
    const auto left_out = [&](int64_t own) { return call.kinds && kinds[size(own)] != 0; };
    if (left_out(head) && (!second.shared || left_out(head ^ 1))) {
      for (int64_t t = 0; t < c.sk; ++t)
        if (!std::isnan(score[size(head * 2 * c.sk + t)])) worst = INFINITY;
      continue;
    }
    for (int64_t t = 0; t < c.sk; ++t) {
      compare(score[size(head * 2 * c.sk + t)], keys[size(t)]);
      compare(call.strips.sum(head, c.sk - c.sq - t) / static_cast<double>(c.sq), far[size(t)]);
    }
  }
  if (!std::isnan(score.back()) || !std::isnan(score[size(c.sk)])) worst = INFINITY;
  return worst;
}

}  // namespace
}  // namespace heddle

int main(int argc, char** argv) {
  return heddle::emulator::run_cases(heddle::kCases, argc, argv, heddle::check);
}
