#pragma once
#include "core/mask.h"
#include "core/select.h"
#include "ops/flexprefill.h"
#include "ops/probe.h"

// The selection of one head. With V and O the masses of key blocks and of diagonals of blocks for
// the last queries, and P the pooled distribution of a row:
//
//   divergence   sqrt(JS(estimate, V)); below tau pooling is trusted, the head is query-aware
//   budgets      how many entries it takes to exceed gamma: single keys divided by 128 in the mode
//                `reference`, blocks that reach gamma in `coverage`
//   listed       the best columns by V and diagonals by O, among them block 0 and the diagonal; for
//                a query-aware head the pairs of the whole map whose mass is gamma too
//
// A head whose statistics are not finite lists everything. One that is query-aware has no use for
// masses of single keys, the others have none for a map: where neither is computed for the other,
// heads that are not query-aware don't notice what is not finite in queries before the last ones.
namespace heddle {

constexpr int64_t kFlexSlack = 256;  // numbers behind the map that may be read, whatever they are

// Which way a head goes
enum FlexKind : int32_t { kFlexLines, kFlexAware, kFlexAll };

// What is decided on, of all heads; Probe says what the first three hold
struct FlexTask {
  FlexPrefill op;
  int64_t heads, sq, sk, rows, nk;
  float* lines;     // [heads, 2, sk] mass of each key for the last queries, of each distance
  float* map;       // [heads, rows, nk] the pooled distribution of every row of blocks
  float* estimate;  // [heads, nk] the same of the last queries
  float* work;      // [heads, 3, nk + 1] masses of columns and of bands, then which are listed
  uint32_t* bins =
      nullptr;  // [heads, kShareBins] how many shares of a map, if a device counts them
  bool whole;   // blocks: the estimate is the last row of a map

  // `allocate(n)` makes room for n numbers
  template <class Allocate>
  FlexTask(const FlexPrefill& op, const Allocate& allocate)
      : op(op),
        heads(op.q.shape[0] * op.q.shape[2]),
        sq(op.q.shape[1]),
        sk(op.k.shape[1]),
        rows(op.rows()),
        nk(op.columns()),
        whole(sq % op.block == 0) {
    lines = allocate(heads * 2 * sk);
    map = allocate(heads * rows * nk + kFlexSlack);
    work = allocate(heads * 3 * (nk + 1));
    estimate = whole ? map + (rows - 1) * nk : allocate(heads * nk);
  }
  // For an estimate that is there before a map
  template <class Allocate> void set_apart(const Allocate& allocate) {
    if (whole) estimate = allocate(heads * nk);
    whole = false;
  }

  Probe probe_lines() const {
    Probe probe = of_last(lines, 2, sk);
    probe.kind = Probe::kRows;
    probe.per = Probe::kLine;
    return probe;
  }
  Probe probe_map() const {
    Probe probe = of(op.q, map, rows, nk);
    probe.softmax = true;
    return probe;
  }
  // Unless blocks are whole
  Probe probe_estimate() const {
    Probe probe = of_last(estimate, 1, nk);
    probe.softmax = true;
    return probe;
  }

 private:
  Probe of(const Tensor& q, float* to, int64_t lines, int64_t columns) const {
    Probe probe;
    probe.q = q;
    probe.k = op.k;
    probe.block_q = probe.block_k = op.block;
    probe.scale = op.scale;
    Tensor& score = probe.score;
    score.data = to;
    score.rank = 4;
    score.device = q.device;
    const int64_t shape[] = {q.shape[0], q.shape[2], lines, columns};
    int64_t stride = 1;
    for (int i = 3; i >= 0; stride *= shape[i--]) {
      score.shape[i] = shape[i];
      score.strides[i] = stride;
    }
    return probe;
  }
  Probe of_last(float* to, int64_t lines, int64_t columns) const {
    Tensor last = op.q;
    const int64_t first = sq > op.block ? sq - op.block : 0;
    last.data =
        last.as<char>() + first * last.strides[1] * static_cast<int64_t>(size_of(last.dtype));
    last.shape[1] -= first;
    Probe probe = of(last, to, lines, columns);
    probe.block_q = last.shape[1];
    return probe;
  }
};

// Memory of a team; several that work on one head find the same
struct FlexMemory {
  Histogram bins;
  float parts[256];
  float divergence;
  bool finite;
};

// Tokens whose masses add up to that of a block: `line` 0 is of keys, 1 of distances. A distance of
// o + x blocks, x < 1, lies on diagonal o of blocks for 1 - x of all queries and on the next for x,
// which `coverage` goes by; the released code bands distances instead. Where blocks of queries
// begin inside those of keys, diagonals count from the block in which their last query stands, so
// that all distances are longer by what the first lacks.
struct FlexSum {
  float* from;
  int64_t first, count;  // token that `from` begins with, and how many follow
  float* to;
  float slope, peak;  // of weights, which are 1 where the slope is 0

  HEDDLE_HD FlexSum(const FlexTask& task, int64_t head, int64_t line, int64_t c) {
    const FlexPrefill& op = task.op;
    const int64_t sk = task.sk, nk = task.nk;
    const bool tent = line == 1 && op.coverage;
    // Bands count from the farthest distance: a short last block shifts them
    const int64_t longer = tent ? nk * op.block - (sk - task.sq) : nk * op.block - sk;
    const int64_t shift = line == 1 ? longer % op.block : 0, middle = c * op.block - shift;
    const int64_t begin = tent ? middle - op.block : middle;
    first = begin < 0 ? 0 : begin;
    const int64_t last = middle + op.block, end = last < sk ? last : sk;
    from = task.lines + (head * 2 + line) * sk + first;
    count = end - first;
    to = task.work + (head * 3 + line) * (nk + 1) + c;
    slope = tent ? 1.f / static_cast<float>(op.block) : 0.f;
    peak = static_cast<float>(middle - first);
  }
  HEDDLE_HD float weight(int64_t i) const {
    return 1 - slope * fabsf(static_cast<float>(i) - peak);
  }
};

// The visible pairs of a map of blocks by number. Row r sees r + ahead + 1 columns, but for the
// last row, so that rows r and rows - 1 - r fill one line of `width` pairs together, or but for
// one.
struct FlexTriangle {
  int64_t rows, columns, ahead, width, count;
  uint32_t inverse;  // of the width, in 2^-32, rounded up

  HEDDLE_HD FlexTriangle(int64_t rows, int64_t columns, int64_t ahead)
      : rows(rows),
        columns(columns),
        ahead(ahead),
        width(rows + 2 * ahead + 1),
        count((rows + 1) / 2 * width),
        inverse(static_cast<uint32_t>((int64_t{1} << 32) / width + 1)) {}

  HEDDLE_HD int64_t seen(int64_t row) const {
    const int64_t all = row + ahead + 1;
    return all < columns ? all : columns;
  }
  // Where the pair stands in the map, or -1
  HEDDLE_HD int64_t at(int64_t i) const {
    const auto number = static_cast<uint32_t>(i), all = static_cast<uint32_t>(width);
    auto line = static_cast<uint32_t>(uint64_t{number} * inverse >> 32);
    auto c = static_cast<int32_t>(number - line * all);
    if (c < 0) {  // the line is one too far, at most
      --line;
      c += static_cast<int32_t>(all);
    }
    const auto upper = static_cast<int32_t>(seen(line));
    if (c < upper) return line * columns + c;
    const int64_t other = rows - 1 - line;
    return other > line && c - upper < seen(other) ? other * columns + (c - upper) : -1;
  }
};

// Pairs with a rank above it are listed; the one that crosses gamma is not in the released code
HEDDLE_HD inline uint64_t flexprefill_floor(const FlexPrefill& op, const Cut& cut) {
  return op.coverage ? cut.least - 1 : cut.last;
}

// What a block with estimate a and mass v adds to twice the divergence
HEDDLE_HD inline float flexprefill_apart(const FlexPrefill& op, float a, float v) {
  const float m = (a + v) / 2;
  // 0 log 0 is 0 but in the released code, where it is NaN and the head not query-aware
  return (op.coverage && !(a > 0) ? 0 : a * logf(a / m)) +
         (op.coverage && !(v > 0) ? 0 : v * logf(v / m));
}
HEDDLE_HD inline float flexprefill_distance(float sum) {
  return sqrtf(sum > 0 ? sum / 2 : sum != sum ? sum : 0);
}
HEDDLE_HD inline FlexKind flexprefill_kind(const FlexPrefill& op, float distance, bool finite) {
  if (!finite || op.gamma >= 1) return kFlexAll;
  return distance < static_cast<float>(op.tau) ? kFlexAware : kFlexLines;
}

// Whether all rows of a map are finite: what is not finite in a mean of q makes the first score of
// its row so, in one of k the estimate
template <class Team>
HEDDLE_HD bool flexprefill_finite(const Team& own, const FlexTask& task, int64_t head,
                                  FlexMemory& memory) {
  own.each(1, [&](int64_t) { memory.finite = true; });
  own.each(task.rows, [&](int64_t row) {
    const float first = task.map[(head * task.rows + row) * task.nk];
    if (first - first != 0) memory.finite = false;
  });
  return memory.finite;
}

// Which way a head goes, where the map and the sums of blocks are there
template <class Team>
HEDDLE_HD FlexKind flexprefill_decide(const Team& own, const FlexTask& task, int64_t head,
                                      FlexMemory& memory) {
  const FlexPrefill& op = task.op;
  const int64_t nk = task.nk;
  const float* estimate = task.estimate + head * (task.whole ? task.rows : 1) * nk;
  const float* vertical = task.work + head * 3 * (nk + 1);
  const float* slash = vertical + nk + 1;
  constexpr int64_t kParts = sizeof memory.parts / sizeof memory.parts[0], kAhead = 4;
  flexprefill_finite(own, task, head, memory);
  // All that waits for memory at once
  own.each(kParts > nk ? kParts : nk, [&](int64_t i) {
    if (i < nk) {
      const float sum = estimate[i] + vertical[i] + slash[i];
      if (sum - sum != 0) memory.finite = false;
    }
    if (i >= kParts) return;
    float sum = 0;
    for (int64_t c = i; c < nk; c += kAhead * kParts) {
      float estimates[kAhead], masses[kAhead];
      for (int64_t j = 0; j < kAhead; ++j) {
        const int64_t at = c + j * kParts < nk ? c + j * kParts : nk - 1;
        estimates[j] = estimate[at];
        masses[j] = vertical[at];
      }
      for (int64_t j = 0; j < kAhead && c + j * kParts < nk; ++j)
        sum += flexprefill_apart(op, estimates[j], masses[j]);
    }
    memory.parts[i] = sum;
  });
  for (int64_t half = kParts / 2; half > 0; half /= 2)
    own.each(half, [&](int64_t i) { memory.parts[i] += memory.parts[i + half]; });
  own.each(1, [&](int64_t) {
    memory.divergence = flexprefill_distance(memory.parts[0]);
    static_cast<float*>(op.divergence.data)[head] = memory.divergence;
  });
  return flexprefill_kind(op, memory.divergence, memory.finite);
}

// Who finds nothing ahead of what everybody does
struct FlexFinder {
  template <class... Args> HEDDLE_HD bool pairs(const Args&...) const { return false; }
  HEDDLE_HD int64_t tokens(int, const Wanted&) const { return -1; }
};

// After that. `own` is a team for itself, `all` are those who have this head to do.
// `finder.pairs(visible, wanted, write)` may find the pairs of a map and write all words, or return
// false; `finder.tokens(line, wanted)` may find how many tokens a budget takes, as far as it
// matters, or return -1.
template <class Team, class Group, class Finder>
HEDDLE_HD void flexprefill_head(const Team& own, const Group& all, const FlexTask& task,
                                int64_t head, FlexKind kind, FlexMemory& memory,
                                const Finder& finder) {
  const FlexPrefill& op = task.op;
  const int64_t sk = task.sk, rows = task.rows, nk = task.nk, block = op.block,
                line_words = (nk + 31) / 32;
  const auto words = static_cast<uint32_t>(op.blocks.shape[3]);
  const float* columns = task.lines + head * 2 * sk;
  const float* distances = columns + sk;
  const float* map = task.map + head * rows * nk;
  float* vertical = task.work + head * 3 * (nk + 1);
  float* slash = vertical + nk + 1;
  auto* column_bits = reinterpret_cast<int32_t*>(slash + nk + 1);
  int32_t* band_bits = column_bits + line_words;
  int32_t* bits = static_cast<int32_t*>(op.blocks.data) + head * rows * words;
  const int64_t ahead = sk - task.sq;
  const FlexTriangle visible(rows, nk, (ahead + block - 1) / block);
  const int64_t first_seen = ahead / block;  // of the diagonal of row 0
  const auto clamp = [](int64_t x, int64_t least, int64_t most) {
    return x < least ? least : x > most ? most : x;
  };

  const bool full = kind == kFlexAll, aware = kind == kFlexAware;
  const int64_t most = op.most > 0 && op.most < nk ? op.most : nk;
  const int64_t least = op.least < most ? op.least : most;
  const auto exceed = [](double amount) {
    return Wanted{true, static_cast<unsigned long long>(floor(amount * kMassSteps)) + 1};
  };
  const auto share_mass = [](int64_t, uint64_t rank) { return mass_of_share(share_of(rank)); };
  const auto best = [&](int line) -> uint64_t {
    if (full) return 1;
    const float *blocks = line ? slash : vertical, *tokens = line ? distances : columns;
    const auto rank = [&](int64_t i) { return rank_of(blocks[i], i, i == 0); };
    int64_t count = least;
    if (!aware) {
      Wanted wanted = exceed(op.gamma);
      if (op.coverage) {
        wanted.amount = static_cast<unsigned long long>(ceil(op.gamma * kMassSteps));
        const auto mass = [&](int64_t i, uint64_t) { return mass_of_share(blocks[i]); };
        count = static_cast<int64_t>(select(own, nk, wanted, rank, mass, memory.bins).count);
      } else {
        wanted.grain = 128;
        const auto share = [&](int64_t i) { return rank_of_share(tokens[i], i); };
        count = finder.tokens(line, wanted);
        if (count < 0)
          count =
              static_cast<int64_t>(select(all, sk, wanted, share, share_mass, memory.bins).count);
        count = count / 128 + 1;
      }
      count = clamp(count, least, most);
    }
    const auto none = [](int64_t, uint64_t) { return 0ull; };
    return select(own, nk, Wanted{false, static_cast<unsigned long long>(count)}, rank, none,
                  memory.bins)
        .least;
  };
  // In a loop, so that this much code is there once
  uint64_t least_of[2];
  for (int line = 0; line < 2; ++line) least_of[line] = best(line);
  // Whoever works on a head writes all of them: that takes less time than waiting for others
  own.words(
      2 * line_words,
      [&](int64_t i, int64_t bit) {
        const bool band = i >= line_words;
        const int64_t c = (band ? i - line_words : i) * 32 + bit;
        return c < nk && rank_of((band ? slash : vertical)[c], c, c == 0) >= least_of[band];
      },
      [&](int64_t i, uint32_t word) { column_bits[i] = static_cast<int32_t>(word); });
  // Row `row`, columns from 32 * i on, of which some pairs are listed
  const auto write = [&](int64_t row, int64_t i, uint32_t pairs) {
    const int64_t from = i * 32, last = visible.seen(row) - 1,
                  diagonal = op.coverage ? row + visible.ahead : last;
    uint64_t seen = pairs | bits_at(column_bits, line_words, from) | bit_range(-from, 1 - from) |
                    bit_range(first_seen + row - from, last + 1 - from);
    seen |= reverse_bits(bits_at(band_bits, line_words, diagonal - from - 63));
    bits[row * words + i] =
        static_cast<int32_t>(static_cast<uint32_t>(full ? ~uint64_t{0} : seen) &
                             static_cast<uint32_t>(bit_range(0, last + 1 - from)));
  };
  uint64_t pair_floor = ~uint64_t{0};  // pairs above it are listed
  if (aware) {
    const Wanted wanted = exceed(op.gamma * static_cast<double>(rows));
    if (finder.pairs(visible, wanted, write)) return;
    const auto rank = [&](int64_t i) {
      const int64_t at = visible.at(i);
      return at < 0 ? 0 : rank_of_share(map[at], at);
    };
    pair_floor =
        flexprefill_floor(op, select(all, visible.count, wanted, rank, share_mass, memory.bins));
  }
  // Indices of words have 32 bits, which makes dividing them cheap
  const auto row_of = [&](int64_t i) { return static_cast<uint32_t>(i) / words; };
  all.words(
      rows * words,
      [&](int64_t i, int64_t bit) {
        if (!aware) return false;
        const int64_t row = row_of(i), c = (i - row * words) * 32 + bit, at = row * nk + c;
        return c < visible.seen(row) && rank_of_share(map[at], at) > pair_floor;
      },
      [&](int64_t i, uint32_t pairs) {
        const int64_t row = row_of(i);
        write(row, i - row * words, pairs);
      });
}

}  // namespace heddle
