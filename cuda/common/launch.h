#pragma once
#include <cstddef>
#include <cstdint>
#include <tuple>
#include <vector>

#include "common/check.h"

namespace heddle {

// Kernels of a stream as graphs of one node each. To tell such a graph what its kernel is called
// with and to launch it takes the host about half of what a launch does.
class KernelGraphs {
 public:
  void launch(const cudaKernelNodeParams& node, cudaStream_t stream);
  void clear();

 private:
  struct Made {
    const void* kernel;
    cudaGraph_t graph;
    cudaGraphNode_t node;
    cudaGraphExec_t exec;
  };
  std::vector<Made> made_;
};

struct Launch {
  int ctas, threads;
  size_t smem_bytes;
  cudaStream_t stream;
  bool overlaps = false;  // may begin before the kernel before has ended, which says from when on
  bool together = false;  // all CTAs run at the same time, or the launch fails
  int rows = 1;           // of so many CTAs
  int cluster = 1;        // of so many CTAs side by side, which run at the same time
  // By these, unless null. Not of what overlaps, runs together or is a cluster.
  KernelGraphs* graphs = nullptr;
};

template <class... Params, class... Args>
void launch_graph(KernelGraphs& graphs, void (*kernel)(Params...), const cudaLaunchConfig_t& config,
                  const Args&... args) {
  std::tuple<Params...> values(args...);
  std::apply(
      [&](auto&... value) {
        void* params[] = {&value...};
        cudaKernelNodeParams node{};
        node.func = reinterpret_cast<void*>(kernel);
        node.gridDim = config.gridDim;
        node.blockDim = config.blockDim;
        node.sharedMemBytes = static_cast<unsigned>(config.dynamicSmemBytes);
        node.kernelParams = params;
        graphs.launch(node, config.stream);
      },
      values);
}

// Once a device: lets a kernel have more shared memory than the few bytes that need no asking.
// `ready` is the kernel's own and remembers the devices.
void allow_shared_memory(const void* kernel, size_t smem_bytes, uint64_t& ready);

// The same for a kernel whose tiles differ in size from call to call. Other threads may call it,
// too: what it may have never becomes less.
void allow_shared_memory(const void* kernel, size_t smem_bytes);

// Enqueues such a kernel
template <class... Params, class... Args>
void launch_grid(void (*kernel)(Params...), dim3 grid, int threads, size_t smem_bytes,
                 cudaStream_t stream, const Args&... args) {
  allow_shared_memory(reinterpret_cast<const void*>(kernel), smem_bytes);
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  HEDDLE_CUDA(cudaLaunchKernelEx(&config, kernel, args...));
}

// Enqueues a kernel that keeps its tiles in dynamic shared memory. Every call of one kernel asks
// for the same amount.
template <auto kKernel, class... Args> void launch(const Launch& launch, const Args&... args) {
  static uint64_t ready = 0;
  allow_shared_memory(reinterpret_cast<const void*>(kKernel), launch.smem_bytes, ready);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(launch.ctas), static_cast<unsigned>(launch.rows));
  config.blockDim = dim3(static_cast<unsigned>(launch.threads));
  config.dynamicSmemBytes = launch.smem_bytes;
  config.stream = launch.stream;
  if (launch.graphs) return launch_graph(*launch.graphs, kKernel, config, args...);
  cudaLaunchAttribute attributes[3]{};
  config.attrs = attributes;
  if (launch.overlaps) {
    cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
  }
  if (launch.together) {
    cudaLaunchAttribute& cooperative = attributes[config.numAttrs++];
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
  }
  if (launch.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(launch.cluster), 1, 1};
  }
  HEDDLE_CUDA(cudaLaunchKernelEx(&config, kKernel, args...));
}

}  // namespace heddle
