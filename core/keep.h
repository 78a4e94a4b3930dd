#pragma once
#include "core/select.h"
#include "ops/keep.h"

// One selection of `keep`, by a team: a row of one head, or its whole map.
namespace heddle {

// Memory that a team shares
struct KeepMemory {
  Histogram bins;
  float largest;
  unsigned long long total, forced;
};

// Columns that a row takes first: those below `first`, and from `from` to `last`
struct KeepForced {
  int64_t first, from, last;

  HEDDLE_HD KeepForced(const Keep& op, int64_t row) : first(op.force_first) {
    const int64_t query = row * op.block_q, rest = op.sq - query,
                  end = op.ahead + query + (rest < op.block_q ? rest : op.block_q);
    from = (op.ahead + query) / op.block_k - op.force_diagonal + 1;
    last = op.force_diagonal > 0 ? (end - 1) / op.block_k : -1;
  }
  HEDDLE_HD bool has(int64_t column) const {
    return column < first || (column >= from && column <= last);
  }
};

template <class Team>
HEDDLE_HD void keep_part(const Team& team, const Keep& op, int64_t head, int64_t first_row,
                         int64_t rows, KeepMemory& memory) {
  const int64_t columns = op.score.shape[3], words = op.blocks.shape[3], count = rows * columns;
  const int64_t start = head * op.score.shape[2] + first_row;
  float* score = static_cast<float*>(op.score.data) + start * columns;
  int32_t* bits = static_cast<int32_t*>(op.blocks.data) + start * words;

  // Of one row they are found once: divisions take longer than all else
  const KeepForced single(op, first_row);
  const auto forced = [&](int64_t i) {
    if (rows == 1) return single.has(i);
    return KeepForced(op, first_row + i / columns).has(i % columns);
  };
  const auto rank = [&](int64_t i) { return rank_of(score[i], i, forced(i)); };
  team.each(1, [&](int64_t) {
    memory.largest = 0;
    memory.total = memory.forced = 0;
  });
  int64_t fewest = op.least * rows;
  Wanted wanted{op.rule == Keep::kCoverage, static_cast<unsigned long long>(op.top)};
  if (op.rule == Keep::kCoverage) {
    team.highest(memory.largest, count, [&](int64_t i) { return score[i]; });
    const float largest = memory.largest;
    team.sum(memory.total, count, [&](int64_t i) { return mass_of(score[i], largest); });
    const double share = op.coverage * static_cast<double>(memory.total);
    wanted.amount = static_cast<unsigned long long>(ceil(share));
    if (op.coverage >= 1) wanted = {false, static_cast<unsigned long long>(count)};
    // However little of it reaches the share
    if (op.force_first > 0 || op.force_diagonal > 0) {
      team.sum(memory.forced, count, [&](int64_t i) { return forced(i) && rank(i) != 0 ? 1 : 0; });
      const auto all = static_cast<int64_t>(memory.forced);
      if (all > fewest) fewest = all;
    }
  }
  const float largest = memory.largest;
  const auto mass = [&](int64_t i, uint64_t) { return mass_of(score[i], largest); };
  const auto at_most = [&](int64_t n) {
    return select(team, count, Wanted{false, static_cast<unsigned long long>(n)}, rank, mass,
                  memory.bins);
  };
  Cut cut{1, 0};
  if (op.rule == Keep::kThreshold) {
    // The rank of the lowest index at this score, and all above it
    const uint64_t own = rank_of(static_cast<float>(op.threshold), 0, false);
    cut.least = own & ~uint64_t{0xffffffff};
    team.sum(memory.total, count, [&](int64_t i) { return rank(i) >= cut.least ? 1 : 0; });
    cut.count = memory.total;
  } else {
    cut = select(team, count, wanted, rank, mass, memory.bins);
  }
  if (fewest > 0 && cut.count < static_cast<unsigned long long>(fewest)) cut = at_most(fewest);
  if (op.most > 0 && cut.count > static_cast<unsigned long long>(op.most * rows))
    cut = at_most(op.most * rows);
  const int64_t row_words = (columns + 31) / 32;
  const auto row_of = [&](int64_t at) { return rows == 1 ? 0 : at / row_words; };
  team.words(
      rows * row_words,
      [&](int64_t at, int64_t bit) {
        const int64_t row = row_of(at), c = (at - row * row_words) * 32 + bit;
        const uint64_t own = c < columns ? rank(row * columns + c) : 0;
        return own != 0 && own >= cut.least;
      },
      [&](int64_t at, uint32_t found) {
        const int64_t row = row_of(at);
        bits[row * words + at - row * row_words] |= static_cast<int32_t>(found);
      });
}

}  // namespace heddle
