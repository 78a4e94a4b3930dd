#pragma once
#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "common/context.h"

namespace heddle {

struct Launch {
  int ctas, threads;
  size_t smem_bytes;
  cudaStream_t stream;
};

// Enqueues a kernel that keeps its tiles in dynamic shared memory. Every call of one kernel asks
// for the same amount.
template <auto kKernel, class... Args> void launch(const Launch& launch, const Args&... args) {
  static std::atomic<uint64_t> ready{0};  // a bit per device; beyond 64 it is done every time
  int device = 0;
  HEDDLE_CUDA(cudaGetDevice(&device));
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (!(ready.load(std::memory_order_relaxed) & bit)) {
    HEDDLE_CUDA(cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel),
                                     cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(launch.smem_bytes)));
    ready.fetch_or(bit, std::memory_order_relaxed);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(launch.ctas));
  config.blockDim = dim3(static_cast<unsigned>(launch.threads));
  config.dynamicSmemBytes = launch.smem_bytes;
  config.stream = launch.stream;
  HEDDLE_CUDA(cudaLaunchKernelEx(&config, kKernel, args...));
}

}  // namespace heddle
