#include "fetch/fetch.cuh"

#include "common/elements.cuh"
#include "core/registry.h"

namespace heddle {
namespace {

__global__ void __launch_bounds__(1024)
    fetch_place_kernel(const __grid_constant__ Fetch op, int32_t* fresh, int* fault) {
  fetch_place(op, fresh, fault);
}

template <class Unit>
__global__ void __launch_bounds__(kThreads)
    fetch_copy_kernel(const __grid_constant__ Fetch op, const int32_t* fresh, const Unit* far,
                      Unit* near, int64_t units) {
  fetch_copy(op, fresh, far, near, units);
}

template <class Unit>
void copy(const Fetch& op, const int32_t* fresh, const Tensor& far, const Tensor& near,
          int64_t bytes, CudaContext& context) {
  const auto units = bytes / static_cast<int64_t>(sizeof(Unit));
  fetch_copy_kernel<<<blocks_for(op.wanted.shape[0] * units, context), kThreads, 0,
                      context.stream>>>(op, fresh, far.as<Unit>(), near.as<Unit>(), units);
  context.launched("fetch_copy_kernel");
}

void run(const Fetch& op, CudaContext& context) {
  auto* fresh = context.scratch<int32_t>(static_cast<size_t>(op.wanted.shape[0]));
  int* fault = context.fault("wanted must name pages that exist");
  fetch_place_kernel<<<1, 1024, 0, context.stream>>>(op, fresh, fault);
  context.launched("fetch_place_kernel");
  for (const auto& [near, far] : {std::pair{&op.near_k, &op.k}, std::pair{&op.near_v, &op.v}}) {
    const int64_t bytes = *far ? Fetch::page_bytes(*far) : 0;
    if (bytes == 0 || op.wanted.size() == 0) continue;
    const auto start =
        reinterpret_cast<uintptr_t>(far->data) | reinterpret_cast<uintptr_t>(near->data);
    if (bytes % 16 == 0 && start % 16 == 0) {
      copy<uint4>(op, fresh, *far, *near, bytes, context);
    } else {
      copy<uint16_t>(op, fresh, *far, *near, bytes, context);
    }
  }
}

HEDDLE_REGISTER(Fetch);

}  // namespace
}  // namespace heddle
