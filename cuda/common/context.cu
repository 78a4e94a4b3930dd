#include "common/context.h"

#include <new>

namespace heddle {

void fail_cuda(cudaError_t status, const char* call) {
  const Code code = status == cudaErrorMemoryAllocation ? Code::kMemory : Code::kCuda;
  fail(code, "",
       concat(cudaGetErrorString(status), " (", cudaGetErrorName(status), " from ", call, ")"));
}

FaultPool::~FaultPool() {
  for (void* block : blocks_) cudaFreeHost(block);
}

std::shared_ptr<Fault> FaultPool::take(cudaStream_t stream) {
  constexpr int kBlock = 256;
  Fault* fault;
  {
    std::lock_guard lock(mutex_);
    if (free_.empty()) {
      void* block;
      HEDDLE_CUDA(cudaHostAlloc(&block, kBlock * sizeof(Fault), cudaHostAllocDefault));
      blocks_.push_back(block);
      for (int i = 0; i < kBlock; ++i) free_.push_back(static_cast<Fault*>(block) + i);
    }
    fault = free_.back();
    free_.pop_back();
  }
  HEDDLE_CUDA(cudaMemsetAsync(&fault->word, 0, sizeof fault->word, stream));
  return {fault, [pool = shared_from_this()](Fault* used) {
            std::lock_guard lock(pool->mutex_);
            pool->free_.push_back(used);
          }};
}

CudaContext::~CudaContext() {
  for (void* memory : scratch_) cudaFreeAsync(memory, stream);
}

void* CudaContext::scratch_bytes(size_t nbytes) {
  void* memory;
  HEDDLE_CUDA(cudaMallocAsync(&memory, nbytes ? nbytes : 1, stream));
  scratch_.push_back(memory);
  return memory;
}

int* CudaContext::tickets() {
  if (!tickets_) {
    HEDDLE_CUDA(cudaMallocAsync(&tickets_, 2 * sizeof(int), stream));
    HEDDLE_CUDA(cudaMemsetAsync(tickets_, 0, 2 * sizeof(int), stream));
  }
  return tickets_;
}

int* CudaContext::fault(const char* text) {
  const std::shared_ptr<Fault> fault = pool_.take(stream);
  fault->op = op_;
  fault->text = text;
  faults.emplace_back(fault, &fault->word);
  return &fault->word;
}

void CudaContext::launched(const char* kernel) const {
  if (const cudaError_t status = cudaGetLastError(); status != cudaSuccess)
    fail(Code::kCuda, "",
         concat(kernel, " failed: ", cudaGetErrorString(status), " (", cudaGetErrorName(status),
                ")"));
}

}  // namespace heddle
