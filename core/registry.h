#pragma once
#include <atomic>
#include <cstddef>
#include <cstring>
#include <string>
#include <vector>

#include "core/schema.h"
#include "core/slot.h"

namespace heddle {

// Instruction sets that cpu/ is compiled for, worst first; HEDDLE_ISA names one while such a file
// compiles
inline constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512"};
// The best one this machine has, or what HEDDLE_CPU_ISA asks for
int best_isa();

// An operator as the binding sees it: bytes that a schema describes, and a function per device.
struct Operator {
  std::string name;
  Schema schema;
  size_t alignment = 0;
  std::vector<std::byte> initial;  // its arguments where all that may be are left out
  // Rules across arguments and defaults that depend on shapes; may be null
  void (*validate)(void* arguments) = nullptr;
  Slot<CpuContext> cpu;
  Slot<CudaContext> cuda;
  mutable std::atomic<void*> spare{nullptr};  // memory for arguments, of a call that is gone
};

// Every operator, by order of name
const std::vector<const Operator*>& operators();

// Finds or makes the entry of a name
Operator& operator_entry(const char* name);

template <class Op> bool register_operator(void (*run)(const Op&, CpuContext&), int isa) {
  static_assert(std::is_trivially_copyable_v<Op>);
  if (isa > best_isa()) return false;
  Operator& entry = operator_entry(Op::kName);
  if (entry.initial.empty()) {
    entry.schema = SchemaOf<Op>();
    entry.alignment = alignof(Op);
    Op initial{};
    entry.schema.set_defaults(&initial);
    entry.initial.resize(sizeof(Op));
    std::memcpy(entry.initial.data(), &initial, sizeof(Op));
    if constexpr (requires(Op & op) { op.validate(); })
      entry.validate = [](void* arguments) { static_cast<Op*>(arguments)->validate(); };
  }
  if (isa < entry.cpu.isa) return false;
  entry.cpu.isa = isa;
  entry.cpu.fill(run);
  return true;
}

}  // namespace heddle
