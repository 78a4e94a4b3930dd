#pragma once
#include <cstddef>

#include "emulator.h"

using cudaStream_t = void*;

namespace heddle {

struct Launch {
  int ctas, threads;
  size_t smem_bytes;
  cudaStream_t stream;
  bool overlaps = false, together = false;
  int rows = 1, cluster = 1;
};

template <auto kKernel, class... Args> void launch(const Launch& launch, const Args&... args) {
  emulator::launch(launch.ctas, launch.threads, launch.smem_bytes, [&] { kKernel(args...); });
}

}  // namespace heddle
