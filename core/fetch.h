#pragma once
#include "core/host_device.h"
#include "ops/fetch.h"

namespace heddle {

// A slot as Fetch::slots has it
struct FetchSlot {
  int32_t page, wanted;
};

// Finds a slot for every wanted page, by a team (core/select.h has teams) that also does
//
//   take(x)            x++, whoever does it at the same time
//   swap(x, from, to)  whether x was `from`, and is `to` now
//
// Of those whose page has to be copied first, fresh[i] is the slot, else -1. `misfit` is called for
// a page that does not exist.
template <class Team, class Misfit>
HEDDLE_HD void fetch_slots(const Team& team, const Fetch& op, int32_t* fresh,
                           const Misfit& misfit) {
  const auto* wanted = static_cast<const int32_t*>(op.wanted.data);
  auto* found = static_cast<int32_t*>(op.found.data);
  auto* places = static_cast<int32_t*>(op.places.data);
  auto* slots = static_cast<FetchSlot*>(op.slots.data);
  auto* counts = static_cast<unsigned long long*>(op.counts.data);
  const int64_t length = *static_cast<const int32_t*>(op.length.data), size = op.k.shape[1];
  const int64_t all = length > 0 ? (length + size - 1) / size : 0, most = op.wanted.shape[0];
  const int64_t n = all < most ? all : most, count = op.slots.shape[0];
  const auto now = static_cast<int32_t>(counts[Fetch::kTime]);

  team.each(most, [&](int64_t i) {
    const int32_t page = wanted[i];
    fresh[i] = -1;
    found[i] = i < n ? -1 : 0;
    if (i >= n) return;
    if (page < 0 || page >= op.k.shape[0]) return misfit();
    const int32_t slot = places[page];
    if (slot < 0 || slot >= count) return;
    found[i] = slot;
    slots[slot].wanted = now;
    team.take(counts[Fetch::kFound]);
  });
  const unsigned long long first = counts[Fetch::kNext];
  team.wait();
  team.each(n, [&](int64_t i) {
    const int32_t page = wanted[i];
    if (found[i] >= 0 || page < 0 || page >= op.k.shape[0]) return;
    team.take(counts[Fetch::kMissed]);
    if (!team.swap(places[page], -1, -2)) return;
    for (;;) {
      const unsigned long long next = team.take(counts[Fetch::kNext]);
      if (next - first >= static_cast<unsigned long long>(count)) {
        places[page] = -1;
        return;
      }
      // Nobody else looks at this one now
      const auto at = static_cast<int32_t>(next % static_cast<unsigned long long>(count));
      FetchSlot& slot = slots[at];
      if (slot.page >= 0 && now - slot.wanted <= op.patience) continue;
      if (slot.page >= 0 && slot.page < op.places.shape[0]) places[slot.page] = -1;
      slot = {page, now};
      places[page] = found[i] = fresh[i] = at;
      return;
    }
  });
  team.each(1, [&](int64_t) {
    counts[Fetch::kMissed] += static_cast<unsigned long long>(all - n);
    ++counts[Fetch::kTime];
  });
}

}  // namespace heddle
