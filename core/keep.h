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

template <class Team>
HEDDLE_HD void keep_part(const Team& team, const Keep& op, int64_t head, int64_t first_row,
                         int64_t rows, KeepMemory& memory) {
  const int64_t columns = op.score.shape[3], words = op.blocks.shape[3], count = rows * columns;
  const int64_t start = head * op.score.shape[2] + first_row;
  float* score = static_cast<float*>(op.score.data) + start * columns;
  int32_t* bits = static_cast<int32_t*>(op.blocks.data) + start * words;

  const auto forced = [&](int64_t i) {
    const int64_t c = i % columns, query = (first_row + i / columns) * op.block_q;
    const int64_t own = (op.ahead + query) / op.block_k;
    const int64_t rest = op.sq - query;
    const int64_t last =
        (op.ahead + query + (rest < op.block_q ? rest : op.block_q) - 1) / op.block_k;
    return c < op.force_first ||
           (op.force_diagonal > 0 && c > own - op.force_diagonal && c <= last);
  };
  const auto rank = [&](int64_t i) { return rank_of(score[i], i, forced(i)); };
  team.each(1, [&](int64_t) {
    memory.largest = 0;
    memory.total = memory.forced = 0;
  });
  int64_t fewest = op.least * rows;
  Wanted wanted{op.rule == Keep::kCoverage, static_cast<unsigned long long>(op.top)};
  if (op.rule == Keep::kCoverage) {
    team.each(count, [&](int64_t i) {
      if (score[i] > 0) team.raise(memory.largest, score[i]);
    });
    const float largest = memory.largest;
    team.each(count, [&](int64_t i) { team.add(memory.total, mass_of(score[i], largest)); });
    const double share = op.coverage * static_cast<double>(memory.total);
    wanted.amount = static_cast<unsigned long long>(ceil(share));
    if (op.coverage >= 1) wanted = {false, static_cast<unsigned long long>(count)};
    // However little of it reaches the share
    if (op.force_first > 0 || op.force_diagonal > 0) {
      team.each(count, [&](int64_t i) {
        if (forced(i) && rank(i) != 0) team.add(memory.forced, 1);
      });
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
    team.each(count, [&](int64_t i) {
      if (rank(i) >= cut.least) team.add(memory.total, 1);
    });
    cut.count = memory.total;
  } else {
    cut = select(team, count, wanted, rank, mass, memory.bins);
  }
  if (fewest > 0 && cut.count < static_cast<unsigned long long>(fewest)) cut = at_most(fewest);
  if (op.most > 0 && cut.count > static_cast<unsigned long long>(op.most * rows))
    cut = at_most(op.most * rows);
  // A word belongs to one call, so that nobody else writes it
  const int64_t row_words = (columns + 31) / 32;
  team.each(rows * row_words, [&](int64_t at) {
    const int64_t row = at / row_words, word = at % row_words;
    uint32_t found = 0;
    for (int64_t c = word * 32; c < columns && c < word * 32 + 32; ++c) {
      const uint64_t own = rank(row * columns + c);
      if (own != 0 && own >= cut.least) found |= 1u << (c & 31);
    }
    bits[row * words + word] |= static_cast<int32_t>(found);
  });
}

}  // namespace heddle
