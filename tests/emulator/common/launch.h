#pragma once
#include <cstddef>

#include "cuda_runtime.h"

namespace heddle {

class KernelGraphs;

struct Launch {
  int ctas, threads;
  size_t smem_bytes;
  cudaStream_t stream;
  bool overlaps = false, together = false;
  int rows = 1, cluster = 1;
  KernelGraphs* graphs = nullptr;
};

template <auto kKernel, class... Args> void launch(const Launch& launch, const Args&... args) {
  gridDim.y = launch.rows;
  for (blockIdx.y = 0; blockIdx.y < launch.rows; ++blockIdx.y)
    emulator::launch(launch.ctas, launch.threads, launch.smem_bytes, [&] { kKernel(args...); });
}

// What kernels declare as shared memory of a size that they are launched with
inline thread_local float smem[58112]{};

template <class... Params, class... Args>
void launch_grid(void (*kernel)(Params...), dim3 grid, int threads, size_t smem_bytes, cudaStream_t,
                 const Args&... args) {
  if (smem_bytes > sizeof smem) emulator::fault("too much shared memory");
  int begun = 0;
  gridDim.y = static_cast<int>(grid.y);
  gridDim.z = static_cast<int>(grid.z);
  for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
      emulator::launch(static_cast<int>(grid.x), threads, 0, [&] {
        // no numbers before the kernel has written some
        if (begun++ % threads == 0) std::fill(std::begin(smem), std::end(smem), NAN);
        kernel(args...);
      });
}

}  // namespace heddle
