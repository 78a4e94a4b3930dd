#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/host_device.h"

// Choosing the best of many scores without sorting them, the same on every device.
//
// Scores become 64-bit ranks, all different: the order of the number above, the index below, so
// that a larger score comes first and then the lower index. A radix search from the top byte on
// finds the rank at which a count is full or a mass is reached. Masses are integers, whose sum does
// not depend on its order.
//
// A team works on one selection: one thread of the CPU, a CTA, or several. It has
//   each(n, body)    calls body(i) for i < n, shared among its threads, and waits
//   words(n, bit, body)
//                    calls body(i, word) for i < n, where bit j of a word is bit(i, j)
//   sum(x, n, value) x += value(i) for i < n, and waits; highest(x, n, value) is the same of the
//                    maximum, of numbers and x >= 0
//   raise(x, y)      x = max(x, y), whoever does it at the same time, x >= 0
//   wait()           until all threads are here
//   count(bins, n, digit, by_mass, rank, mass)
//                    how many ranks have which digit, and their masses if these are asked for
//   crossing(bins, wanted, above)
//                    the digit, from the top, whose bin reaches what is wanted, -1 if none does;
//                    takes what is above it off `wanted` and adds its count to `above`
//   few_of(wanted), few(bins, n, wanted, rank, mass)
//                    the selection of up to so many ranks at once
namespace heddle {

// The chosen: ranks from `least` on. All of them but the last one chosen are above `last`.
struct Cut {
  uint64_t least;
  unsigned long long count;
  uint64_t last = 0;
};

struct Histogram {
  unsigned long long count[256], mass[256];
  Cut cut;
};

// What a search wants of the ranks from the top: a number of them, or the fewest that reach a mass,
// of which nobody asks for more than count / grain
struct Wanted {
  bool by_mass;
  unsigned long long amount;
  unsigned long long grain = 1;
};

// Eight bits of the ranks that begin as `prefix` does, as far as bits are `known`
struct Digit {
  int shift = 56;
  uint64_t prefix = 0, known = 0;

  Digit() = default;
  // Of ranks from one to another
  HEDDLE_HD Digit(uint64_t least, uint64_t most) {
    while (shift > 0 && (least ^ most) >> (shift + 7) == 0) --shift;
    known = shift + 8 < 64 ? ~uint64_t{0} << (shift + 8) : 0;
    prefix = least & known;
  }
  HEDDLE_HD bool has(uint64_t rank) const { return rank != 0 && (rank & known) == prefix; }
  HEDDLE_HD int of(uint64_t rank) const { return static_cast<int>(rank >> shift & 255); }
  // Of the ranks that have it
  HEDDLE_HD void add(int digit) {
    prefix |= static_cast<uint64_t>(digit) << shift;
    known |= uint64_t{255} << shift;
  }
  // The digit below
  HEDDLE_HD Digit next() const {
    Digit digit = *this;
    digit.shift = shift < 8 ? 0 : shift - 8;
    return digit;
  }
};

// The first half of a rank. That of invisible scores (-inf) is 0; NaN comes last among the visible,
// and -0 equals 0.
HEDDLE_HD inline uint32_t order_of(float score, bool forced) {
  if (score == -INFINITY) return 0;
  if (forced) return 0xfffffffeu;  // above +inf, and no rank is all ones
  if (score != score) return 1;
  const float number = score == 0 ? 0.f : score;
  uint32_t bits;
  memcpy(&bits, &number, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// 0 of invisible scores
HEDDLE_HD inline uint64_t rank_of(float score, int64_t index, bool forced) {
  const uint32_t order = order_of(score, forced);
  return order == 0 ? 0 : static_cast<uint64_t>(order) << 32 | ~static_cast<uint32_t>(index);
}

constexpr double kMassSteps = 1099511627776.0;  // 2^40

// A mass relative to the largest one, which may be infinite; what is no positive number weighs
// nothing
HEDDLE_HD inline unsigned long long mass_of(float score, float largest) {
  if (!(score > 0)) return 0;
  const double share = score == largest ? 1 : static_cast<double>(score) / largest;
  return static_cast<unsigned long long>(share * kMassSteps);
}

// The same of shares of 1, all below 2: no digit of their ranks is the same for all
HEDDLE_HD inline uint64_t rank_of_share(float share, int64_t index) {
  if (!(share >= 0)) return 0;
  uint32_t bits;
  memcpy(&bits, &share, sizeof bits);
  return static_cast<uint64_t>(bits) << 34 | uint64_t{~static_cast<uint32_t>(index)} << 2;
}
HEDDLE_HD inline float share_of(uint64_t rank) {
  const auto bits = static_cast<uint32_t>(rank >> 34);
  float share;
  memcpy(&share, &bits, sizeof share);
  return share;
}
// Shares by their first bits, down to 2^-31, so finely that few have the same; bin_share is the
// least of a bin
constexpr int kShareBins = 4096;
HEDDLE_HD inline int share_bin(float share) {
  int32_t bits;
  memcpy(&bits, &share, sizeof bits);
  const int32_t bin = (bits - 0x30000000) >> 16;
  return bin < 0 ? 0 : bin < kShareBins ? bin : kShareBins - 1;
}
HEDDLE_HD inline float bin_share(int bin) {
  const int32_t bits = bin == 0 ? 0 : 0x30000000 + (bin << 16);
  float share;
  memcpy(&share, &bits, sizeof share);
  return share;
}
HEDDLE_HD inline unsigned long long mass_of_share(float share) {
  return share > 0 ? static_cast<unsigned long long>(share * static_cast<float>(kMassSteps)) : 0;
}

// The crossing among the digits from `digit` down to `last`, last - 1 if it is not there
HEDDLE_HD inline int crossing_of(const Histogram& bins, int digit, int last, Wanted& wanted,
                                 unsigned long long& above) {
  for (; digit >= last; --digit) {
    const unsigned long long held = wanted.by_mass ? bins.mass[digit] : bins.count[digit];
    if (held >= wanted.amount) break;
    wanted.amount -= held;
    above += bins.count[digit];
  }
  return digit;
}

// `rank(i)` and `mass(i, rank)` of n scores, from the first `digit` that they do not have in
// common; all visible ones if they do not amount to what is wanted. `bins` is memory that the team
// shares.
template <class Team, class Rank, class Mass>
HEDDLE_HD Cut select(const Team& team, int64_t n, Wanted wanted, const Rank& rank, const Mass& mass,
                     Histogram& bins, Digit digit = {}) {
  unsigned long long above = 0;
  if (wanted.amount == 0) return {~uint64_t{0}, 0, ~uint64_t{0}};
  if (n <= team.few_of(wanted)) return team.few(bins, n, wanted, rank, mass);
  for (;; digit = digit.next()) {
    team.count(bins, n, digit, wanted.by_mass, rank, mass);
    // Every thread learns the same, and all are through before the bins are cleared
    const int found = team.crossing(bins, wanted, above);
    const unsigned long long held = found < 0 ? 0 : bins.count[found];
    team.wait();
    if (found < 0) return {1, above};
    digit.add(found);
    // The whole bin is wanted, or all of its ranks give one answer: other digits do not matter
    if (digit.shift == 0 || (above + 1) / wanted.grain == (above + held) / wanted.grain ||
        (!wanted.by_mass && held == wanted.amount))
      return {digit.prefix, above + held, digit.prefix | ~digit.known};
  }
}

}  // namespace heddle
