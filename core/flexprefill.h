#pragma once
#include "core/select.h"
#include "ops/flexprefill.h"

// The selection of one head by a team. With V and O the masses of key blocks and of bands of
// distances for the last queries, and P the pooled distribution of a row:
//
//   divergence   sqrt(JS(estimate, V)); below tau pooling is trusted, the head is query-aware
//   budgets      how many entries it takes to exceed gamma: single keys divided by 128 in the mode
//                `reference`, blocks that reach gamma in `coverage`
//   listed       the best columns by V, the best bands by O, block 0 and the diagonal among them;
//                for a query-aware head the pairs of the whole map whose mass is gamma too
//
// A head whose statistics are not finite lists everything.
namespace heddle {

struct FlexMemory {
  Histogram bins;
  float largest;
  unsigned long long total;
  float divergence;
  bool finite;
};

// Masses of n entries: how many it takes to exceed a share of them, or to reach it
template <class Team, class Score>
HEDDLE_HD Cut cover(const Team& team, int64_t n, double share, bool exceed, const Score& score,
                    int64_t forced, FlexMemory& memory) {
  team.each(1, [&](int64_t) {
    memory.largest = 0;
    memory.total = 0;
  });
  team.each(n, [&](int64_t i) {
    if (score(i) > 0) team.raise(memory.largest, score(i));
  });
  const float largest = memory.largest;
  const auto mass = [&](int64_t i) { return mass_of(score(i), largest); };
  const auto rank = [&](int64_t i) { return rank_of(score(i), i, i == forced); };
  team.each(n, [&](int64_t i) { team.add(memory.total, mass(i)); });
  const double amount = share * static_cast<double>(memory.total);
  const Wanted wanted{true, exceed ? static_cast<unsigned long long>(floor(amount)) + 1
                                   : static_cast<unsigned long long>(ceil(amount))};
  return select(team, n, wanted, rank, mass, memory.bins);
}

template <class Team>
HEDDLE_HD void flexprefill_head(const Team& team, const FlexPrefill& op, int64_t head,
                                FlexMemory& memory) {
  const int64_t sk = op.lines.shape[3], rows = op.map.shape[2], nk = op.map.shape[3],
                words = op.blocks.shape[3], block = op.block, pad = nk * block - sk;
  const float* columns = static_cast<float*>(op.lines.data) + head * 2 * sk;
  const float* distances = columns + sk;
  const float* estimate = static_cast<float*>(op.estimate.data) + head * nk;
  const float* map = static_cast<float*>(op.map.data) + head * rows * nk;
  float* vertical = static_cast<float*>(op.work.data) + head * 2 * (nk + 1);
  float* slash = vertical + nk + 1;
  int32_t* bits = static_cast<int32_t*>(op.blocks.data) + head * rows * words;
  const int64_t ahead = sk - op.sq;
  const auto last_of = [&](int64_t row) {
    const int64_t end = (row + 1) * block < op.sq ? (row + 1) * block : op.sq;
    return (ahead + end - 1) / block;
  };
  const auto first_of = [&](int64_t row) { return (ahead + row * block) / block; };

  const auto clamp = [](int64_t x, int64_t least, int64_t most) {
    return x < least ? least : x > most ? most : x;
  };
  team.each(nk, [&](int64_t c) {
    float sum = 0, band = 0;
    for (int64_t t = c * block; t < sk && t < (c + 1) * block; ++t) sum += columns[t];
    // Bands count from the farthest distance: a short last block shifts them
    for (int64_t t = clamp(c * block - pad, 0, sk); t < clamp((c + 1) * block - pad, 0, sk); ++t)
      band += distances[t];
    vertical[c] = sum;
    slash[c] = band;
  });
  team.each(1, [&](int64_t) {
    float sum = 0;
    bool finite = true;
    for (int64_t c = 0; c < nk; ++c) {
      const float a = estimate[c], v = vertical[c], m = (a + v) / 2;
      finite = finite && a - a == 0 && v - v == 0 && slash[c] - slash[c] == 0;
      // 0 log 0 is 0 but in the released code, where it is NaN and the head not query-aware
      if (op.coverage ? a > 0 : true) sum += a * logf(a / m);
      if (op.coverage ? v > 0 : true) sum += v * logf(v / m);
    }
    memory.divergence = sqrtf(sum > 0 ? sum / 2 : sum != sum ? sum : 0);
    memory.finite = finite;
    static_cast<float*>(op.divergence.data)[head] = memory.divergence;
  });
  team.each(rows * nk, [&](int64_t i) {
    if (map[i] != map[i]) memory.finite = false;
  });
  const auto set = [&](int64_t row, int64_t c) {
    if (c >= 0 && c <= last_of(row))
      bits[row * words + c / 32] |= static_cast<int32_t>(1u << (c & 31));
  };
  if (!memory.finite || op.gamma >= 1) {
    team.each(rows, [&](int64_t row) {
      for (int64_t c = 0; c < nk; ++c) set(row, c);
    });
    return;
  }
  const bool aware = memory.divergence < static_cast<float>(op.tau);
  const int64_t most = op.most > 0 && op.most < nk ? op.most : nk;
  const int64_t least = op.least < most ? op.least : most;
  const auto by_column = [&](int64_t c) { return vertical[c]; };
  const auto by_band = [&](int64_t c) { return slash[c]; };
  const auto best = [&](const auto& score, const float* tokens) {
    Cut cut{0, 0};
    int64_t count = least;
    if (op.coverage) {
      cut = cover(team, nk, op.gamma, false, score, 0, memory);
      if (!aware) count = clamp(static_cast<int64_t>(cut.count), least, most);
    } else if (!aware) {
      const auto token = [&](int64_t t) { return tokens[t]; };
      cut = cover(team, sk, op.gamma, true, token, -1, memory);
      count = clamp(static_cast<int64_t>(cut.count) / 128 + 1, least, most);
    }
    const auto rank = [&](int64_t i) { return rank_of(score(i), i, i == 0); };
    const auto none = [](int64_t) { return 0ull; };
    return select(team, nk, Wanted{false, static_cast<unsigned long long>(count)}, rank, none,
                  memory.bins)
        .least;
  };
  const uint64_t least_column = best(by_column, columns), least_band = best(by_band, distances);
  uint64_t least_pair = ~uint64_t{0};
  if (aware) {
    const auto pair = [&](int64_t i) { return map[i]; };
    const Cut crossing = cover(team, rows * nk, op.gamma, true, pair, -1, memory);
    // The pair that crosses gamma is not listed in the released code
    least_pair = op.coverage ? crossing.least : crossing.least + 1;
  }
  team.each(rows, [&](int64_t row) {
    set(row, 0);
    for (int64_t c = first_of(row); c <= last_of(row); ++c) set(row, c);
    for (int64_t c = 0; c < nk; ++c) {
      if (rank_of(vertical[c], c, c == 0) >= least_column) set(row, c);
      if (rank_of(slash[c], c, c == 0) >= least_band) {
        set(row, last_of(row) - c);
        // A band of distances lies on two diagonals of blocks
        if (op.coverage) set(row, last_of(row) - c - 1);
      }
      const uint64_t own = rank_of(map[row * nk + c], row * nk + c, false);
      if (aware && own != 0 && own >= least_pair) set(row, c);
    }
  });
}

}  // namespace heddle
