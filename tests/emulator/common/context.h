#pragma once
#include "core/check.h"
#include "cuda_runtime.h"

// The emulator's side of cuda/common/context.h
namespace heddle {

[[noreturn]] inline void fail_with(Code, const char*, const Part*, size_t) {
  emulator::fault("a call is declined");
}

struct CudaContext {
  cudaStream_t stream = nullptr;
  int processors = 2;
  void launched(const char*) const {}
};

}  // namespace heddle
