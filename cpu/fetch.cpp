#include "core/fetch.h"

#include <cstring>
#include <vector>

#include "core/cpu_context.h"
#include "core/registry.h"
#include "cpu/team.h"

namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {
namespace {

struct Team : Alone {
  template <class X> X take(X& x) const { return x++; }
  bool swap(int32_t& x, int32_t from, int32_t to) const { return x == from && (x = to, true); }
};

void run(const Fetch& op, CpuContext& context) {
  const int64_t n = op.wanted.shape[0];
  std::vector<int32_t> fresh(static_cast<size_t>(n));
  fetch_slots(Team{}, op, fresh.data(),
              [] { fail(Code::kArgument, "wanted", "wanted must name pages that exist"); });
  context.parallel(n, [&](int64_t i, int) {
    const int64_t slot = fresh[static_cast<size_t>(i)], page = op.wanted.as<int32_t>()[i];
    if (slot < 0) return;
    for (const auto& [near, far] : {std::pair{&op.near_k, &op.k}, std::pair{&op.near_v, &op.v}}) {
      if (!*far) continue;
      const auto bytes = static_cast<size_t>(Fetch::page_bytes(*far));
      std::memcpy(near->as<char>() + static_cast<size_t>(slot) * bytes,
                  far->as<char>() + static_cast<size_t>(page) * bytes, bytes);
    }
  });
}

HEDDLE_REGISTER(Fetch);

}  // namespace
}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
