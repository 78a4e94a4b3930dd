#include "core/registry.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace heddle {
namespace {

// Registration runs before main, in any order of files, and nothing is destroyed at exit
std::vector<const Operator*>& table() {
  static auto* operators = new std::vector<const Operator*>;
  return *operators;
}

int detect_isa() {
  int best = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    best = 1;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      best = 2;
  }
#endif
  if (const char* wanted = std::getenv("HEDDLE_CPU_ISA"))
    for (int i = 0; i <= best; ++i)
      if (std::strcmp(wanted, kIsaNames[i]) == 0) return i;
  return best;
}

}  // namespace

int best_isa() {
  static const int isa = detect_isa();
  return isa;
}

const std::vector<const Operator*>& operators() { return table(); }

Operator& operator_entry(const char* name) {
  auto& all = table();
  auto at =
      std::lower_bound(all.begin(), all.end(), name,
                       [](const Operator* entry, const char* key) { return entry->name < key; });
  if (at == all.end() || (*at)->name != name) {
    auto* entry = new Operator;
    entry->name = name;
    at = all.insert(at, entry);
  }
  return const_cast<Operator&>(**at);
}

Slot<CudaContext>& cuda_slot(const char* op) { return operator_entry(op).cuda; }

}  // namespace heddle
