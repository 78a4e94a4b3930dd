#include "flexprefill/choice.cuh"

#include <deque>
#include <limits>

#include "cpu/team.h"
#include "tensor.h"

namespace heddle {
namespace {

constexpr float kNone = std::numeric_limits<float>::quiet_NaN();

struct Case {
  int64_t sq, sk, heads;
  int threads, members, groups;
  FlexPrefill settings;    // numbers only
  float odd = 0;           // stands somewhere in the statistics of a head
  int64_t room = 1 << 20;  // of a list
  bool even = false;       // rows of a map, so that many shares are the same
  bool decided = false;    // which way heads go, and masses of blocks
};

FlexPrefill settings(int64_t block, double gamma, double tau, bool coverage, int64_t least = 1,
                     int64_t most = 0) {
  FlexPrefill op;
  op.block = block;
  op.gamma = gamma;
  op.tau = tau;
  op.coverage = coverage;
  op.least = least;
  op.most = most;
  return op;
}

// Heads of both kinds, alone and together; blocks that sequences end in, many equal masses
const Case kCases[] = {
    {1, 1, 1, 32, 1, 1, settings(16, 0.5, 0.1, false)},
    {40, 40, 1, 64, 2, 1, settings(16, 0.9, 1, true)},
    {333, 1000, 3, 64, 1, 2, settings(16, 0.6, 0.3, false)},
    {700, 700, 2, 96, 3, 2, settings(16, 0.8, 0, false)},
    {700, 711, 2, 64, 2, 1, settings(16, 0.8, 0, true, 3, 9)},
    {1000, 1000, 3, 128, 2, 2, settings(16, 0.7, 1, false)},
    {1000, 1003, 3, 64, 4, 1, settings(16, 0.95, 1, true, 2)},
    {1000, 1003, 3, 64, 3, 1, settings(16, 0.9, 1, true, 2), 0, 2},
    {1000, 1000, 3, 64, 2, 1, settings(16, 0.99, 0, false)},
    {1000, 1000, 2, 64, 2, 1, settings(16, 0.9999, 1, false, 2)},
    {1700, 1700, 1, 64, 1, 1, settings(16, 0.8, 0, false, 30, 60)},
    {600, 600, 2, 256, 2, 2, settings(128, 0.9, 0.2, true, 2)},
    {1000, 1003, 3, 64, 4, 1, settings(16, 0.9, 0.3, false, 2), 0, 1 << 20, false, true},
    {333, 1000, 2, 64, 1, 2, settings(16, 0.6, 1, false, 5), 0, 1 << 20, false, true},
    {700, 700, 2, 96, 3, 2, settings(16, 0.8, 0, false), 0, 1 << 20, false, true},
    // of equal masses it takes a look at each to find which of them reach gamma
    {200, 200, 2, 64, 1, 2, settings(16, 0.6356, 0, false), 0, 1 << 20, true, true},
    {700, 700, 2, 64, 2, 1, settings(16, 0.75, 0, false), 0, 1 << 20, true, true},
    {300, 400, 1, 64, 2, 1, settings(32, 1, 0.1, false)},
    {4400, 4400, 2, 288, 2, 1, settings(16, 0.9, 0.3, false, 7)},
    {4400, 4400, 1, 288, 2, 1, settings(16, 0.95, 1, true, 2), 0, 1 << 20, true},
    {500, 500, 2, 64, 2, 2, settings(16, 0.9, 1, false), kNone},
    {500, 500, 2, 64, 2, 1, settings(16, 0.9, 0, true), std::numeric_limits<float>::infinity()},
};

// Masses in steps of 2^-17 that add up to 1, so that sums, also of shares of 1 / block, don't
// depend on their order: even, with some large ones, with some of nothing, or all the same
void spread(float* to, int64_t n, int kind, emulator::Random& random) {
  const auto count = static_cast<uint32_t>(n), all = 1u << 17, least = kind == 2 ? 0u : 1u;
  std::vector<uint32_t> steps(count, least);
  for (uint32_t left = all - count * least; left > 0;) {
    if (kind == 3) {
      steps.assign(count, all / count);
      steps[0] += all % count;
      break;
    }
    const uint32_t share = kind == 0 ? all / count / 4 : left / 3;
    const uint32_t own = std::min(left, 1 + random.below(share + 1));
    steps[random.below(count)] += own;
    left -= own;
  }
  for (int64_t i = 0; i < n; ++i)
    to[i] = static_cast<float>(steps[static_cast<size_t>(i)]) / static_cast<float>(all);
}

double check(const Case& c, emulator::Random& random) {
  FlexPrefill op = c.settings;
  op.q = tensor(nullptr, {1, c.sq, c.heads, 64});
  op.k = tensor(nullptr, {1, c.sk, c.heads, 64});
  const auto block = op.block, nk = op.columns(), rows = op.rows(),
             words = (nk + 31) / 32 + random.below(2);
  const auto size = [](int64_t n) { return static_cast<size_t>(n); };
  std::deque<std::vector<float>> memory;
  FlexTask task(op, [&](int64_t n) { return memory.emplace_back(size(n), -INFINITY).data(); });
  float *lines = task.lines, *map = task.map;
  for (int64_t line = 0; line < c.heads * 2; ++line)
    spread(lines + line * c.sk, c.sk, c.even && c.decided ? 3 : static_cast<int>(line % 3), random);
  for (int64_t head = 0; head < c.heads; ++head) {
    if (!task.whole) spread(task.estimate + head * nk, nk, 0, random);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t end = std::min((row + 1) * block, c.sq);
      spread(map + (head * rows + row) * nk, (c.sk - c.sq + end - 1) / block + 1,
             c.even ? 3 : static_cast<int>(head % 2), random);
    }
  }
  if (c.odd != 0) (std::isnan(c.odd) ? map[rows / 2 * nk] : lines[c.sk / 2]) = c.odd;
  std::vector<int32_t> expected(size(c.heads * rows * words), 1), bits(expected.size(), 2);
  std::vector<float> divergence(size(c.heads), kNone);
  task.op.divergence = tensor(divergence.data(), {1, c.heads});
  task.op.blocks = tensor(expected.data(), {1, c.heads, rows, words});
  std::vector<int32_t> kinds;
  for (int64_t head = 0; head < c.heads; ++head) {
    for (int64_t i = 0; i < 2 * nk; ++i) {
      const FlexSum sum(task, head, i / nk, i % nk);
      *sum.to = 0;
      for (int64_t t = 0; t < sum.count; ++t) *sum.to += sum.from[t] * sum.weight(t);
    }
    FlexMemory own;
    const HEDDLE_ISA_NAMESPACE::Alone alone;
    const FlexKind kind = flexprefill_decide(alone, task, head, own);
    flexprefill_head(alone, alone, task, head, kind, own, FlexFinder{});
    kinds.push_back(kind);
  }
  const std::vector<float> wanted = divergence;

  if (!c.decided) {
    std::fill_n(task.work, c.heads * 3 * (nk + 1), kNone);
    std::fill(divergence.begin(), divergence.end(), kNone);
  }
  task.op.blocks.data = bits.data();
  // As the probe leaves them
  std::vector<uint32_t> bins(size(c.heads * kShareBins));
  task.bins = bins.data();
  const FlexTriangle visible(rows, nk, (c.sk - c.sq + block - 1) / block);
  for (int64_t head = 0; head < c.heads; ++head)
    for (int64_t i = 0; i < visible.count; ++i)
      if (const int64_t at = visible.at(i); at >= 0)
        ++bins[size(head * kShareBins + share_bin(map[head * rows * nk + at]))];
  // Distances as walks on Hopper leave them
  LineStrips strips{};
  std::vector<float> parts;
  if (c.members > 1 || c.decided) {
    const int64_t length = 128, queries = std::min(block, c.sq);
    strips = {nullptr, length, (c.sk + length - 1) / length};
    parts.assign(size(c.heads * strips.count * (length + 128)), 0);
    strips.distances = parts.data();
    for (int64_t head = 0; head < c.heads; ++head)
      for (int64_t i = 0; i < c.sk; ++i) {
        const int64_t from = c.sk - queries - i, s = std::max<int64_t>(from, 0) / length;
        float& mass = lines[(head * 2 + 1) * c.sk + i];
        const bool two = s + 1 < strips.count && (s + 1) * length < from + 128;
        const float own = mass * static_cast<float>(queries) / (two ? 2 : 1);
        for (int64_t part = s; part < s + 1 + two; ++part)
          strips.of(head, part)[(part + 1) * length - from] = own;
        mass = kNone;
      }
  }
  std::vector<FlexGroup> groups(size(c.groups));
  std::memset(static_cast<void*>(groups.data()), 0xff, groups.size() * sizeof(FlexGroup));
  // Behind them lies what names the first pair, for who reads on
  std::vector<uint64_t> list(size(c.groups * c.members * c.room + (1 << 16)), ~uint64_t{0});
  std::vector<FlexBin> line_bins(size(c.heads * 2 * kShareBins));
  const FlexArgs args{task,
                      groups.data(),
                      list.data(),
                      c.room,
                      c.groups,
                      c.members,
                      strips,
                      c.decided ? kinds.data() : nullptr,
                      c.decided ? line_bins.data() : nullptr};
  for (int64_t head = 0; head < c.heads && c.decided; ++head) {
    // What such a head has no use for, others have
    if (kinds[size(head)] != kFlexLines) std::fill_n(lines + head * 2 * c.sk, c.sk, kNone);
    if (kinds[size(head)] != kFlexAware) {
      std::fill_n(map + head * rows * nk, rows * nk, kNone);
      std::fill_n(bins.data() + head * kShareBins, kShareBins, 0u);
    }
  }
  if (c.decided) {
    const int64_t run = 300;
    std::vector<FlexCounts> counting(1);
    emulator::launch(static_cast<int>(c.heads * 2 * ((c.sk + run - 1) / run)), c.threads, 0,
                     [&] { flexprefill_count(args, run, blockIdx.x, counting[0]); });
  } else {
    const int warps = c.threads / 32;
    emulator::launch(static_cast<int>((c.heads * 2 * nk + warps - 1) / warps), c.threads, 0,
                     [&] { flexprefill_sum(args, blockIdx.x * warps + threadIdx.x / 32); });
  }
  std::vector<FlexShared> shared(size(c.groups * c.members));
  emulator::launch_together(c.groups * c.members, c.threads, [&] {
    flexprefill_choose(args, blockIdx.x, shared[size(blockIdx.x)]);
  });
  // NaN is what it is
  const bool same = std::memcmp(wanted.data(), divergence.data(), wanted.size() * 4) == 0;
  const auto zero = [](const auto& x) {
    return std::all_of(x.begin(), x.end(), [](auto own) { return own == 0; });
  };
  const bool clear = zero(bins) && zero(line_bins);
  return same && clear && bits == expected ? 0 : INFINITY;
}

}  // namespace
}  // namespace heddle

int main(int argc, char** argv) {
  return heddle::emulator::run_cases(heddle::kCases, argc, argv, heddle::check);
}
