// The operator `fetch` on the emulator: every wanted page has the slot that is said to be its own,
// with its rows in it, and who was to stay stayed.
#include "fetch/fetch.cuh"

#include <vector>

#include "emulator.h"
#include "tensor.h"

namespace heddle {
namespace {

struct Case {
  int64_t pages, slots, n, patience;
  int threads;
};

double check(const Case& c, emulator::Random& random) {
  constexpr int64_t kRow = 6;
  const auto size = [](int64_t n) { return static_cast<size_t>(n); };
  std::vector<uint16_t> far(size(c.pages * kRow)), near(size(c.slots * kRow), 0xffff);
  for (uint16_t& x : far) x = static_cast<uint16_t>(random.below(1000));
  std::vector<int32_t> wanted(size(c.n)), found(size(c.n)), fresh(size(c.n)),
      places(size(c.pages), -1), slots(size(2 * c.slots), -1);
  std::vector<unsigned long long> counts(4);
  int32_t length = 0;
  int fault = 0;
  Fetch op;
  op.k.shape[0] = c.pages;
  op.k.shape[1] = 1;
  op.wanted = tensor(wanted.data(), {c.n});
  op.found = tensor(found.data(), {c.n});
  op.length.data = &length;
  op.places = tensor(places.data(), {c.pages});
  op.slots = tensor(slots.data(), {c.slots, 2});
  op.counts.data = counts.data();
  op.patience = c.patience;
  unsigned long long all = 0;
  for (int call = 0; call < 6; ++call) {
    length = static_cast<int32_t>(1 + random.below(static_cast<uint32_t>(c.n + 2)));
    const int64_t n = std::min<int64_t>(length, c.n);
    all += static_cast<unsigned long long>(length);
    for (int32_t& page : wanted)
      page = static_cast<int32_t>(random.below(static_cast<uint32_t>(c.pages)));
    const std::vector<int32_t> before = places, slots_before = slots;
    emulator::launch(1, c.threads, 0, [&] { fetch_place(op, fresh.data(), &fault); });
    emulator::launch(2, 64, 0,
                     [&] { fetch_copy(op, fresh.data(), far.data(), near.data(), kRow); });
    for (int64_t i = 0; i < n; ++i) {
      const int32_t page = wanted[size(i)], slot = places[size(page)];
      if (found[size(i)] >= 0 && found[size(i)] != slot) return INFINITY;
      if (slot < 0 && c.patience == 0 && c.n <= c.slots) return INFINITY;
      if (before[size(page)] >= 0 && slot != before[size(page)]) return INFINITY;
    }
    int64_t held = 0;
    for (int64_t slot = 0; slot < c.slots; ++slot) {
      const int32_t page = slots[size(2 * slot)], old = slots_before[size(2 * slot)];
      if (old >= 0 && call - slots_before[size(2 * slot + 1)] <= c.patience && page != old)
        return INFINITY;
      if (page < 0) continue;
      ++held;
      if (places[size(page)] != slot) return INFINITY;
      for (int64_t e = 0; e < kRow; ++e)
        if (near[size(slot * kRow + e)] != far[size(page * kRow + e)]) return INFINITY;
    }
    for (const int32_t slot : places) held -= slot >= 0;
    if (held != 0) return INFINITY;
  }
  const bool counted = counts[Fetch::kFound] + counts[Fetch::kMissed] == all;
  return fault == 0 && counted && counts[Fetch::kTime] == 6 ? 0 : INFINITY;
}

const Case kCases[] = {
    {50, 16, 12, 0, 64}, {50, 16, 12, 2, 32}, {9, 4, 7, 0, 64}, {300, 90, 80, 1, 96}};

}  // namespace
}  // namespace heddle

int main(int argc, char** argv) {
  return heddle::emulator::run_cases(heddle::kCases, argc, argv, heddle::check);
}
