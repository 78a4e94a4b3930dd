#include "common/context.h"

#include <atomic>

#include "common/call_context.h"
#include "common/launch.h"
#include "common/variants.h"

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

CallContext::~CallContext() {
  for (void* memory : scratch_) cudaFreeAsync(memory, stream);
}

void* CallContext::scratch_bytes(size_t nbytes) {
  void* memory;
  HEDDLE_CUDA(cudaMallocAsync(&memory, nbytes ? nbytes : 1, stream));
  scratch_.push_back(memory);
  return memory;
}

int* CallContext::tickets() {
  if (!tickets_) {
    HEDDLE_CUDA(cudaMallocAsync(&tickets_, 2 * sizeof(int), stream));
    HEDDLE_CUDA(cudaMemsetAsync(tickets_, 0, 2 * sizeof(int), stream));
  }
  return tickets_;
}

int* CallContext::fault(const char* text) {
  const std::shared_ptr<Fault> fault = pool_.take(stream);
  fault->op = op_;
  fault->text = text;
  faults.emplace_back(fault, &fault->word);
  return &fault->word;
}

IdleContext::IdleContext(const DeviceInfo& device)
    : CudaContext(nullptr, device.arch, device.processors) {}

void* IdleContext::scratch_bytes(size_t) { fail(Code::kUnsupported, "", "nothing runs here"); }
int* IdleContext::tickets() { fail(Code::kUnsupported, "", "nothing runs here"); }
int* IdleContext::fault(const char*) { fail(Code::kUnsupported, "", "nothing runs here"); }

void allow_shared_memory(const void* kernel, size_t smem_bytes, uint64_t& ready) {
  int device = 0;
  HEDDLE_CUDA(cudaGetDevice(&device));
  // a bit per device; beyond 64 it is done every time
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  const std::atomic_ref<uint64_t> known(ready);
  if (known.load(std::memory_order_relaxed) & bit) return;
  HEDDLE_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(smem_bytes)));
  known.fetch_or(bit, std::memory_order_relaxed);
}

void CudaContext::launched(const char* kernel) const {
  if (const cudaError_t status = cudaGetLastError(); status != cudaSuccess)
    fail(Code::kCuda, "",
         concat(kernel, " failed: ", cudaGetErrorString(status), " (", cudaGetErrorName(status),
                ")"));
}

}  // namespace heddle
