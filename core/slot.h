#pragma once
#include "core/tensor.h"

namespace heddle {

class CpuContext;
class CudaContext;

// The function of an operator on one kind of device, as the binding calls it
template <class Context> struct Slot {
  void (*thunk)(void (*run)(), const void* arguments, Context& context) = nullptr;
  void (*run)() = nullptr;
  int isa = -1;
  explicit operator bool() const { return run; }
  void operator()(const void* arguments, Context& context) const { thunk(run, arguments, context); }

  template <class Op> void fill(void (*function)(const Op&, Context&)) {
    run = reinterpret_cast<void (*)()>(function);
    thunk = [](void (*erased)(), const void* arguments, Context& context) {
      reinterpret_cast<void (*)(const Op&, Context&)>(erased)(*static_cast<const Op*>(arguments),
                                                              context);
    };
  }
};

Slot<CudaContext>& cuda_slot(const char* op);

// Its CPU function describes an operator, so that kernels need not know what a schema is
template <class Op> bool register_operator(void (*run)(const Op&, CudaContext&), int) {
  cuda_slot(Op::kName).fill(run);
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
