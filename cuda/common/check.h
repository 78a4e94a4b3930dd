#pragma once
#include <cuda_runtime.h>

// Turns a CUDA error into ours, with the call that met it
#define HEDDLE_CUDA(call)                                           \
  do {                                                              \
    if (const cudaError_t status_ = (call); status_ != cudaSuccess) \
      ::heddle::fail_cuda(status_, #call);                          \
  } while (0)

namespace heddle {

[[noreturn]] void fail_cuda(cudaError_t status, const char* call);

}  // namespace heddle
