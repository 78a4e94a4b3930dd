#pragma once
#include <cstdint>

#include "core/select.h"
#include "cpu/simd.h"

namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {

// A team of one, for what core/select.h writes for teams
struct Alone {
  template <class Body> void each(int64_t n, const Body& body) const {
    for (int64_t i = 0; i < n; ++i) body(i);
  }
  template <class Bit, class Body> void words(int64_t n, const Bit& bit, const Body& body) const {
    for (int64_t i = 0; i < n; ++i) {
      uint32_t word = 0;
      for (int j = 0; j < 32; ++j) word |= static_cast<uint32_t>(bit(i, j)) << j;
      body(i, word);
    }
  }
  template <class Rank, class Mass>
  void count(Histogram& bins, int64_t n, const Digit& digit, bool by_mass, const Rank& rank,
             const Mass& mass) const {
    bins = {};
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t own = rank(i);
      if (!digit.has(own)) continue;
      ++bins.count[digit.of(own)];
      if (by_mass) bins.mass[digit.of(own)] += mass(i, own);
    }
  }
  template <class Value> void sum(unsigned long long& to, int64_t n, const Value& value) const {
    for (int64_t i = 0; i < n; ++i) to += static_cast<unsigned long long>(value(i));
  }
  template <class Value> void highest(float& to, int64_t n, const Value& value) const {
    for (int64_t i = 0; i < n; ++i) raise(to, value(i));
  }
  void raise(float& x, float y) const { x = y > x ? y : x; }
  void raise(uint32_t& x, uint32_t y) const { x = y > x ? y : x; }
  template <class Chosen, class Place>
  void compact(int64_t n, const Chosen& chosen, const Place& place) const {
    for (int64_t i = 0, at = 0; i < n; ++i)
      if (chosen(i)) place(i, at++);
  }
  void wait() const {}
  static int64_t few_of(const Wanted&) { return 0; }
  template <class... Args> Cut few(const Args&...) const { return {}; }
  int crossing(const Histogram& bins, Wanted& wanted, unsigned long long& above) const {
    return crossing_of(bins, 255, 0, wanted, above);
  }
};

}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
