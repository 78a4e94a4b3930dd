#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <type_traits>

#include "common/context.h"

namespace heddle {

struct Launch {
  int ctas, threads;
  size_t smem_bytes;
  cudaStream_t stream;
};

// Enqueues a kernel that keeps its tiles in dynamic shared memory
template <class... Params>
void launch(void (*kernel)(Params...), const Launch& launch,
            const std::type_identity_t<Params>&... args) {
  HEDDLE_CUDA(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(launch.smem_bytes)));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(launch.ctas));
  config.blockDim = dim3(static_cast<unsigned>(launch.threads));
  config.dynamicSmemBytes = launch.smem_bytes;
  config.stream = launch.stream;
  HEDDLE_CUDA(cudaLaunchKernelEx(&config, kernel, Params(args)...));
}

}  // namespace heddle
