#pragma once
#include <cstddef>
#include <cstring>
#include <string>
#include <vector>

#include "core/schema.h"

namespace heddle {

class CpuContext;
class CudaContext;

// Instruction sets that cpu/ is compiled for, worst first; HEDDLE_ISA names one while such a file
// compiles
inline constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512"};
// The best one this machine has, or what HEDDLE_CPU_ISA asks for
int best_isa();

// An operator as the binding sees it: bytes that a schema describes, and a function per device.
struct Operator {
  template <class Context> struct Slot {
    void (*thunk)(void (*run)(), const void* arguments, Context& context) = nullptr;
    void (*run)() = nullptr;
    int isa = -1;
    explicit operator bool() const { return run; }
    void operator()(const void* arguments, Context& context) const {
      thunk(run, arguments, context);
    }
  };

  std::string name;
  Schema schema;
  size_t alignment = 0;
  std::vector<std::byte> initial;  // its arguments where all that may be are left out
  // Rules across arguments and defaults that depend on shapes; may be null
  void (*validate)(void* arguments) = nullptr;
  Slot<CpuContext> cpu;
  Slot<CudaContext> cuda;

  template <class Context> Slot<Context>& slot();
};
template <> inline Operator::Slot<CpuContext>& Operator::slot<CpuContext>() { return cpu; }
template <> inline Operator::Slot<CudaContext>& Operator::slot<CudaContext>() { return cuda; }

// Every operator, by order of name
const std::vector<const Operator*>& operators();

// Finds or makes the entry of a name
Operator& operator_entry(const char* name);

template <class Op, class Context>
bool register_operator(void (*run)(const Op&, Context&), int isa = 0) {
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
  auto& slot = entry.slot<Context>();
  if (isa < slot.isa) return false;
  slot.isa = isa;
  slot.run = reinterpret_cast<void (*)()>(run);
  slot.thunk = [](void (*erased)(), const void* arguments, Context& context) {
    reinterpret_cast<void (*)(const Op&, Context&)>(erased)(*static_cast<const Op*>(arguments),
                                                            context);
  };
  return true;
}

}  // namespace heddle

#ifndef HEDDLE_ISA
#define HEDDLE_ISA 0
#endif
#define HEDDLE_JOIN_(a, b) a##b
#define HEDDLE_JOIN(a, b) HEDDLE_JOIN_(a, b)
// Registers the function `run` that takes (const Op&, CpuContext&) or (const Op&, CudaContext&)
#define HEDDLE_REGISTER(Op)                                                  \
  [[maybe_unused]] static const bool HEDDLE_JOIN(registered_, __COUNTER__) = \
      ::heddle::register_operator<Op>(run, HEDDLE_ISA)
