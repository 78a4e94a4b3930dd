#pragma once
#include <cstddef>
#include <type_traits>

#include "emulator.h"

using cudaStream_t = void*;

namespace heddle {

struct Launch {
  int ctas, threads;
  size_t smem_bytes;
  cudaStream_t stream;
};

template <class... Params>
void launch(void (*kernel)(Params...), const Launch& launch,
            const std::type_identity_t<Params>&... args) {
  emulator::launch(launch.ctas, launch.threads, launch.smem_bytes, [&] { kernel(args...); });
}

}  // namespace heddle
