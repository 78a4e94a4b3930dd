#include "common/context.h"

#include <algorithm>
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
  for (const Batch& batch : waiting_) cudaEventDestroy(batch.done);
  for (void* block : blocks_) {
    std::destroy_n(static_cast<Fault*>(block), kBlock);
    cudaFreeHost(block);
  }
}

std::shared_ptr<Fault> FaultPool::take(cudaStream_t stream, bool capturing) {
  Fault* fault;
  {
    std::lock_guard lock(mutex_);
    if (back_.size() >= kBlock / 2 && !capturing) {
      cudaEvent_t done;
      HEDDLE_CUDA(cudaEventCreateWithFlags(&done, cudaEventDisableTiming));
      waiting_.push_back({done, std::move(back_)});
      back_.clear();
      HEDDLE_CUDA(cudaEventRecord(done, stream));
    }
    if (free_.empty() && !waiting_.empty()) {
      if (cudaEventQuery(waiting_.front().done) == cudaSuccess) {
        cudaEventDestroy(waiting_.front().done);
        free_ = std::move(waiting_.front().faults);
        waiting_.pop_front();
      } else {
        cudaGetLastError();  // not yet
      }
    }
    if (free_.empty()) {
      void* block;
      HEDDLE_CUDA(cudaHostAlloc(&block, kBlock * sizeof(Fault), cudaHostAllocDefault));
      blocks_.push_back(block);
      std::uninitialized_value_construct_n(static_cast<Fault*>(block), kBlock);
      for (size_t i = 0; i < kBlock; ++i) free_.push_back(static_cast<Fault*>(block) + i);
    }
    fault = free_.back();
    free_.pop_back();
  }
  fault->word = 0;
  fault->captured = capturing;
  fault->settled = false;
  return {fault, [pool = shared_from_this()](Fault* used) {
            used->failure = nullptr;
            std::lock_guard lock(pool->mutex_);
            pool->back_.push_back(used);
          }};
}

CallContext::~CallContext() {
  for (void* memory : large_) cudaFreeAsync(memory, stream);
}

void* CallContext::scratch_bytes(size_t nbytes) {
  void* memory = scratch_.take(nbytes);
  if (memory) return memory;
  HEDDLE_CUDA(cudaMallocAsync(&memory, nbytes, stream));
  large_.push_back(memory);
  return memory;
}

namespace {

// At zero, there at once and no part of a graph that is being recorded: what a graph allocates
// only its replays may use
void* lasting_memory(size_t nbytes) {
  cudaStream_t aside;
  HEDDLE_CUDA(cudaStreamCreateWithFlags(&aside, cudaStreamNonBlocking));
  void* memory = nullptr;
  cudaError_t status = cudaMallocAsync(&memory, nbytes, aside);
  if (status == cudaSuccess) status = cudaMemsetAsync(memory, 0, nbytes, aside);
  if (status == cudaSuccess) status = cudaStreamSynchronize(aside);
  cudaStreamDestroy(aside);
  if (status != cudaSuccess) fail_cuda(status, "cudaMallocAsync");
  return memory;
}

}  // namespace

void* Scratch::take(size_t nbytes) {
  constexpr size_t kAlignment = 256, kMost = size_t{64} << 20;
  nbytes = std::max((nbytes + kAlignment - 1) / kAlignment, size_t{1}) * kAlignment;
  if (nbytes > kMost || (size_ == kMost && used_ + nbytes > size_)) return nullptr;
  if (used_ + nbytes > size_) {
    const size_t size = std::max(std::min(2 * size_, kMost), std::max(nbytes, size_t{1} << 20));
    blocks_.push_back(lasting_memory(size));
    size_ = size;
    used_ = 0;
  }
  void* memory = static_cast<char*>(blocks_.back()) + used_;
  used_ += nbytes;
  return memory;
}

void Scratch::clear(cudaStream_t stream) {
  for (void* block : blocks_) cudaFreeAsync(block, stream);
  blocks_.clear();
  size_ = used_ = 0;
}

int* Counters::take(size_t count) {
  if (blocks_.empty() || count > size_) {
    const size_t size = std::max<size_t>({1024, 2 * size_, count});
    blocks_.push_back(static_cast<int*>(lasting_memory(size * sizeof(int))));
    size_ = size;
  }
  return blocks_.back();
}

void Counters::clear(cudaStream_t stream) {
  for (int* block : blocks_) cudaFreeAsync(block, stream);
  blocks_.clear();
  size_ = 0;
}

int* CallContext::counters(size_t count) { return counters_.take(count); }

int* CallContext::verdict(const char* text) {
  const std::shared_ptr<Fault> fault = pool_.take(stream, capturing_);
  fault->op = op_;
  fault->text = text;
  faults.emplace_back(fault, &fault->word);
  return &fault->word;
}

int* CallContext::fault(const char* text) {
  int* word = verdict(text);
  if (capturing_) HEDDLE_CUDA(cudaMemsetAsync(word, 0, sizeof *word, stream));
  return word;
}

IdleContext::IdleContext(const DeviceInfo& device)
    : CudaContext(nullptr, device.arch, device.processors) {}

void* IdleContext::scratch_bytes(size_t) { fail(Code::kUnsupported, "", "nothing runs here"); }
int* IdleContext::counters(size_t) { fail(Code::kUnsupported, "", "nothing runs here"); }
int* IdleContext::verdict(const char*) { fail(Code::kUnsupported, "", "nothing runs here"); }
int* IdleContext::fault(const char*) { fail(Code::kUnsupported, "", "nothing runs here"); }

void KernelGraphs::launch(const cudaKernelNodeParams& node, cudaStream_t stream) {
  auto its = std::find_if(made_.begin(), made_.end(),
                          [&](const Made& made) { return made.kernel == node.func; });
  if (its == made_.end()) its = made_.insert(its, Made{node.func, nullptr, nullptr, nullptr});
  if (its->exec) {
    HEDDLE_CUDA(cudaGraphExecKernelNodeSetParams(its->exec, its->node, &node));
  } else {
    // what a call before had no memory for is made by the next
    if (!its->graph) HEDDLE_CUDA(cudaGraphCreate(&its->graph, 0));
    if (!its->node)
      HEDDLE_CUDA(cudaGraphAddKernelNode(&its->node, its->graph, nullptr, 0, &node));
    else
      HEDDLE_CUDA(cudaGraphKernelNodeSetParams(its->node, &node));
    HEDDLE_CUDA(cudaGraphInstantiate(&its->exec, its->graph, 0));
  }
  HEDDLE_CUDA(cudaGraphLaunch(its->exec, stream));
}

void KernelGraphs::clear() {
  for (const Made& made : made_) {
    if (made.exec) cudaGraphExecDestroy(made.exec);
    if (made.graph) cudaGraphDestroy(made.graph);
  }
  made_.clear();
}

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

void allow_shared_memory(const void* kernel, size_t smem_bytes) {
  // what every kernel has, with room for variables that are static
  if (smem_bytes <= size_t{40} << 10) return;
  static std::mutex mutex;
  std::lock_guard lock(mutex);
  cudaFuncAttributes now;
  HEDDLE_CUDA(cudaFuncGetAttributes(&now, kernel));
  if (static_cast<size_t>(now.maxDynamicSharedSizeBytes) >= smem_bytes) return;
  HEDDLE_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(smem_bytes)));
}

void CudaContext::launched(const char* kernel) const {
  if (const cudaError_t status = cudaGetLastError(); status != cudaSuccess)
    fail(Code::kCuda, "",
         concat(kernel, " failed: ", cudaGetErrorString(status), " (", cudaGetErrorName(status),
                ")"));
}

}  // namespace heddle
