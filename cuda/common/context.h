#pragma once
#include <cstddef>

#include "common/check.h"

namespace heddle {

class KernelGraphs;

// What a CUDA operator may use while it enqueues its kernels. It lives for one call.
class CudaContext {
 public:
  CudaContext(cudaStream_t stream, int arch, int processors, KernelGraphs* graphs = nullptr)
      : stream(stream), arch(arch), processors(processors), graphs(graphs) {}
  virtual ~CudaContext() = default;
  CudaContext(const CudaContext&) = delete;
  CudaContext& operator=(const CudaContext&) = delete;

  // Device memory until the kernels enqueued by this call are done
  template <class T> T* scratch(size_t count) {
    return static_cast<T*>(scratch_bytes(count * sizeof(T)));
  }

  // A word that a kernel sets to 1 when it meets data it cannot use. The outputs then fail with
  // this text on read, as does everything computed from them.
  virtual int* fault(const char* text) = 0;

  // The same, for a kernel that always sets the word, to 0 or 1: it need not be cleared before
  virtual int* verdict(const char* text) = 0;

  // Counters of the stream. A kernel finds them at zero and leaves them so.
  virtual int* counters(size_t count) = 0;

  // After a launch: a configuration that the device refuses throws here, with the kernel's name
  void launched(const char* kernel) const;

  const cudaStream_t stream;
  const int arch;              // 90 for compute capability 9.0
  const int processors;        // multiprocessors
  KernelGraphs* const graphs;  // of the stream, for long kernels; null while a graph is captured

 private:
  virtual void* scratch_bytes(size_t nbytes) = 0;
};

}  // namespace heddle
