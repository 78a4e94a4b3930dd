#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#ifndef HEDDLE_HD
#ifdef __CUDACC__
#define HEDDLE_HD __host__ __device__
#else
#define HEDDLE_HD
#endif
#endif

// Choosing the best of many scores without sorting them, the same on every device.
//
// Scores become 64-bit ranks, all different: the order of the number above, the index below, so
// that a larger score comes first and then the lower index. A radix search from the top byte on
// finds the rank at which a count is full or a mass is reached. Masses are integers, whose sum does
// not depend on its order.
//
// A team works on one selection: one thread of the CPU, or a CTA. It has
//   each(n, body)    calls body(i) for i < n, shared among its threads, and waits
//   add(x, y)        x += y, whoever does it at the same time; raise(x, y) is x = max(x, y), x >= 0
//   wait()           until all threads are here
//   crossing(bins, wanted, above)
//                    the digit, from the top, whose bin reaches what is wanted, -1 if none does;
//                    takes what is above it off `wanted` and adds its count to `above`
namespace heddle {

struct Histogram {
  unsigned long long count[256], mass[256];
};

// What a search wants of the ranks from the top: a number of them, or the fewest that reach a mass
struct Wanted {
  bool by_mass;
  unsigned long long amount;
};

// The chosen: ranks from `least` on
struct Cut {
  uint64_t least;
  unsigned long long count;
};

// Invisible scores (-inf) have rank 0; NaN comes last among the visible, and -0 equals 0
HEDDLE_HD inline uint64_t rank_of(float score, int64_t index, bool forced) {
  if (score == -INFINITY) return 0;
  const float number = score == 0 ? 0.f : score;
  uint32_t bits;
  memcpy(&bits, &number, sizeof bits);
  uint32_t order = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  if (score != score) order = 1;
  if (forced) order = 0xfffffffeu;  // above +inf, and no rank is all ones
  return static_cast<uint64_t>(order) << 32 | ~static_cast<uint32_t>(index);
}

// A mass relative to the largest one; what is no positive number weighs nothing
HEDDLE_HD inline unsigned long long mass_of(float score, float largest) {
  if (!(score > 0) || !(largest > 0)) return 0;
  return static_cast<unsigned long long>(static_cast<double>(score) / largest * 1099511627776.0);
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

// `rank(i)` and `mass(i)` of n scores; all visible ones if they do not amount to what is wanted.
// `bins` is memory that the team shares.
template <class Team, class Rank, class Mass>
HEDDLE_HD Cut select(const Team& team, int64_t n, Wanted wanted, const Rank& rank, const Mass& mass,
                     Histogram& bins) {
  uint64_t prefix = 0, known = 0;
  unsigned long long above = 0;
  if (wanted.amount == 0) return {~uint64_t{0}, 0};
  for (int shift = 56; shift >= 0; shift -= 8) {
    team.each(256, [&](int64_t i) { bins.count[i] = bins.mass[i] = 0; });
    team.each(n, [&](int64_t i) {
      const uint64_t own = rank(i);
      if (own == 0 || (own & known) != prefix) return;
      const int digit = static_cast<int>(own >> shift & 255);
      team.add(bins.count[digit], 1);
      if (wanted.by_mass) team.add(bins.mass[digit], mass(i));
    });
    // Every thread learns the same, and all are through before the bins are cleared
    const int digit = team.crossing(bins, wanted, above);
    const unsigned long long held = digit < 0 ? 0 : bins.count[digit];
    team.wait();
    if (digit < 0) return {1, above};
    prefix |= static_cast<uint64_t>(digit) << shift;
    known |= uint64_t{255} << shift;
    // The whole bin is wanted: its other digits do not matter
    if (shift == 0 || (!wanted.by_mass && held == wanted.amount)) return {prefix, above + held};
  }
  return {1, above};
}

}  // namespace heddle
