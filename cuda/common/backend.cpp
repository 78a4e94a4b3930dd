#include <algorithm>
#include <deque>
#include <map>
#include <thread>

#include "common/call_context.h"
#include "common/launch.h"
#include "core/block_cache.h"

namespace heddle {
namespace {

// Page-locked host memory that copies reach at full speed. It is slow to make, so buffers are kept
// for reuse by size.
class PinnedPool : public std::enable_shared_from_this<PinnedPool> {
 public:
  ~PinnedPool() {
    for (auto& [size, buffers] : free_)
      for (void* buffer : buffers) cudaFreeHost(buffer);
  }

  HostBuffer take(size_t nbytes) {
    size_t size = 4096;
    while (size < nbytes) size *= 2;
    void* buffer = nullptr;
    {
      std::lock_guard lock(mutex_);
      auto& buffers = free_[size];
      if (!buffers.empty()) {
        buffer = buffers.back();
        buffers.pop_back();
        kept_ -= size;
      }
    }
    if (!buffer) HEDDLE_CUDA(cudaHostAlloc(&buffer, size, cudaHostAllocDefault));
    return {buffer, [pool = shared_from_this(), size](void* used) { pool->give(used, size); }};
  }

 private:
  void give(void* buffer, size_t size) {
    constexpr size_t kMost = size_t{256} << 20;
    {
      std::lock_guard lock(mutex_);
      if (kept_ + size <= kMost) {
        kept_ += size;
        free_[size].push_back(buffer);
        return;
      }
    }
    cudaFreeHost(buffer);
  }

  std::mutex mutex_;
  std::map<size_t, std::vector<void*>> free_;
  size_t kept_ = 0;
};

// A stream takes work from the thread of the environment; one thread waits for the copies that
// somebody reads.
class CudaBackend final : public Backend {
 public:
  CudaBackend(int index, DeviceInfo info)
      : Backend({Device::kCuda, index}, weight_of(info.memory)), info_(std::move(info)) {
    HEDDLE_CUDA(cudaSetDevice(index));
    HEDDLE_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    cudaMemPool_t pool;
    HEDDLE_CUDA(cudaDeviceGetDefaultMemPool(&pool, index));
    // Freed memory stays with the process: asking the driver again costs more than any operator
    uint64_t keep = UINT64_MAX;
    HEDDLE_CUDA(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep));
    thread_ = std::thread([this] { serve(); });
  }

  ~CudaBackend() override {
    stop();
    for (cudaEvent_t event : events_) cudaEventDestroy(event);
    clear_blocks();
    counters_.clear(stream_);
    scratch_.clear(stream_);
    graphs_.clear();
    cudaStreamDestroy(stream_);
  }

  void launch(std::shared_ptr<Call> call) override {
    check_lost();
    call->renew_outputs();
    if (const Failure failure = call->inherited()) return call->poison_outputs(failure);
    cudaSetDevice(device.index);
    sweep();
    enqueue(*call, false);
  }

  std::unique_ptr<Graph> capture(std::vector<std::shared_ptr<Call>> calls) override {
    check_lost();
    cudaSetDevice(device.index);
    // relaxed: an operator may ask for page-locked memory on its way
    HEDDLE_CUDA(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed));
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t made = nullptr;
    try {
      for (const auto& call : calls) enqueue(*call, true);
    } catch (...) {
      cudaStreamEndCapture(stream_, &graph);
      if (graph) cudaGraphDestroy(graph);
      cudaGetLastError();
      throw;
    }
    HEDDLE_CUDA(cudaStreamEndCapture(stream_, &graph));
    const cudaError_t status = cudaGraphInstantiate(&made, graph, 0);
    cudaGraphDestroy(graph);
    if (status != cudaSuccess) fail_cuda(status, "cudaGraphInstantiate");
    return std::make_unique<CudaGraph>(std::static_pointer_cast<CudaBackend>(shared_from_this()),
                                       std::move(calls), made);
  }

  std::shared_ptr<Mark> mark() override {
    check_lost();
    cudaSetDevice(device.index);
    auto mark = std::make_shared<EventMark>();
    HEDDLE_CUDA(cudaEventRecord(mark->event, stream_));
    return mark;
  }

  HostBuffer host_buffer(size_t nbytes) override { return pinned_->take(nbytes); }

  void upload(StorageRef to, size_t offset, size_t nbytes, HostBuffer from,
              std::shared_ptr<Gate> gate) override {
    check_lost();
    cudaSetDevice(device.index);
    sweep();
    if (nbytes == to->nbytes) to->renew();
    if (gate) {
      // Runs between the copies of the stream, on a thread of the driver that must not call CUDA;
      // the gate is kept alive by the entry below. What is computed from `to` may be enqueued
      // before it, so that a failure comes by a word, as one of a kernel does.
      struct Wait {
        Gate* gate;
        std::shared_ptr<Fault> fault;
      };
      const std::shared_ptr<Fault> fault = fault_pool_->take(stream_, false);
      to->faults.emplace_back(fault, &fault->word);
      HEDDLE_CUDA(cudaLaunchHostFunc(
          stream_,
          [](void* data) {
            const std::unique_ptr<Wait> wait(static_cast<Wait*>(data));
            wait->fault->failure = wait->gate->wait();
            wait->fault->word = wait->fault->failure != nullptr;
          },
          new Wait{gate.get(), fault}));
    }
    if (nbytes)
      HEDDLE_CUDA(cudaMemcpyAsync(static_cast<char*>(to->data) + offset, from.get(), nbytes,
                                  cudaMemcpyDefault, stream_));
    uploads_.push_back({record(), std::move(from), std::move(gate)});
  }

  void download(StorageRef from, size_t offset, size_t nbytes, HostBuffer to,
                std::function<void(Failure)> done) override {
    cudaSetDevice(device.index);
    sweep();
    cudaError_t status = cudaSuccess;
    if (nbytes)
      status = cudaMemcpyAsync(to.get(), static_cast<const char*>(from->data) + offset, nbytes,
                               cudaMemcpyDefault, stream_);
    cudaEvent_t event = nullptr;
    if (status == cudaSuccess) status = try_record(event);
    {
      std::lock_guard lock(mutex_);
      auto [failure, faults] = std::pair(from->failure(), from->faults);
      downloads_.push_back({event, status, std::move(from), std::move(failure), std::move(faults),
                            std::move(to), std::move(done)});
    }
    filled_.notify_one();
  }

  void stop() override {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    filled_.notify_one();
    if (thread_.joinable()) thread_.join();
    cudaSetDevice(device.index);
    cudaStreamSynchronize(stream_);
    for (Upload& upload : uploads_) events_.push_back(upload.event);
    uploads_.clear();
  }

 protected:
  void* allocate_bytes(size_t nbytes) override {
    check_lost();
    const size_t size = blocks_.class_of(nbytes);
    if (size)
      if (void* block = blocks_.take(size)) return block;
    cudaSetDevice(device.index);
    void* data = nullptr;
    const auto ask = [&] { return cudaMallocAsync(&data, size ? size : nbytes, stream_); };
    cudaError_t status = ask();
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();  // running out of memory is no reason to give up on the device
      clear_blocks();
      status = ask();
    }
    if (status == cudaSuccess) return data;
    cudaGetLastError();
    if (status == cudaErrorMemoryAllocation) return nullptr;
    fail_cuda(status, "cudaMallocAsync");
  }
  void release_bytes(void* data, size_t nbytes) noexcept override {
    const size_t size = blocks_.class_of(nbytes);
    if (!size || !blocks_.give(data, size)) cudaFreeAsync(data, stream_);
  }
  void* allocate_pinned(size_t nbytes) override {
    check_lost();
    if (!fits_machine(nbytes, memory.pinned_bytes.load())) return nullptr;
    cudaSetDevice(device.index);
    sweep();
    void* data = nullptr;
    const auto ask = [&] {
      const cudaError_t status = cudaHostAlloc(&data, std::max<size_t>(nbytes, 1),
                                               cudaHostAllocPortable | cudaHostAllocMapped);
      if (status != cudaSuccess) cudaGetLastError();
      return status == cudaSuccess;
    };
    if (ask()) return data;
    // What was let go of a moment ago is there once the stream is through
    cudaStreamSynchronize(stream_);
    sweep();
    return ask() ? data : nullptr;
  }
  // Nothing frees it in the order of the stream, so it waits for an event, which `sweep` records
  void release_pinned(void* data, size_t) noexcept override {
    std::lock_guard lock(mutex_);
    retired_.emplace_back(data, cudaFreeHost);
  }

 private:
  // A device is a gigabyte to the garbage collector, which begins to mark at 64 MB: a sixteenth of
  // it. Told of every byte it collected in every call with results of gigabytes, for milliseconds.
  static double weight_of(size_t memory) {
    constexpr double kGigabyte = size_t{1} << 30;
    return std::min(1.0, kGigabyte / static_cast<double>(std::max<size_t>(memory, 1)));
  }

  // Memory that is copied to is let go of in the order of the stream
  struct Upload {
    cudaEvent_t event;
    HostBuffer from;
    std::shared_ptr<Gate> gate;
  };
  struct Download {
    cudaEvent_t event;
    cudaError_t status;
    StorageRef from;
    // Of `from` when this was queued
    Failure failure;
    std::vector<std::shared_ptr<const int>> faults;
    HostBuffer to;
    std::function<void(Failure)> done;
  };

  struct EventMark final : Mark {
    EventMark() { HEDDLE_CUDA(cudaEventCreate(&event)); }
    ~EventMark() override { cudaEventDestroy(event); }
    double milliseconds_since(const Mark& earlier) const override {
      float milliseconds = 0;
      HEDDLE_CUDA(
          cudaEventElapsedTime(&milliseconds, static_cast<const EventMark&>(earlier).event, event));
      return milliseconds;
    }
    cudaEvent_t event;
  };

  class CudaGraph final : public Graph {
   public:
    CudaGraph(std::shared_ptr<CudaBackend> backend, std::vector<std::shared_ptr<Call>> calls,
              cudaGraphExec_t graph)
        : backend_(std::move(backend)), calls_(std::move(calls)), graph_(graph) {}
    ~CudaGraph() override {
      cudaSetDevice(backend_->device.index);
      cudaGraphExecDestroy(graph_);  // what runs is finished first
    }
    void replay() override {
      backend_->check_lost();
      cudaSetDevice(backend_->device.index);
      backend_->sweep();
      for (const auto& call : calls_) {
        call->renew_outputs();
        if (const Failure failure = call->inherited()) call->poison_outputs(failure);
        take_over_faults(*call);
      }
      HEDDLE_CUDA(cudaGraphLaunch(graph_, backend_->stream_));
    }

   private:
    const std::shared_ptr<CudaBackend> backend_;
    const std::vector<std::shared_ptr<Call>> calls_;
    const cudaGraphExec_t graph_;
  };

  void enqueue(Call& call, bool capturing) {
    CallContext context(stream_, info_, capturing, *fault_pool_, counters_, scratch_, graphs_,
                        call.op.name.c_str());
    try {
      call.op.cuda(call.arguments, context);
    } catch (const Error& error) {
      if (error.code == Code::kCuda) lose(error, call.op.name.c_str());
      throw;
    }
    for (const StorageRef& output : call.outputs) output->producer = call.op.name.c_str();
    call.faults = std::move(context.faults);
    take_over_faults(call);
  }

  // Whatever is computed from a faulty tensor is faulty as well. Tensors that are updated for ever
  // let go of words that have nothing more to say.
  static void take_over_faults(const Call& call) {
    auto faults = call.faults;
    const auto settled = [](const auto& word) { return fault_of(word)->settled.load(); };
    for (const StorageRef& input : call.inputs) {
      std::erase_if(input->faults, settled);
      faults.insert(faults.end(), input->faults.begin(), input->faults.end());
    }
    for (const StorageRef& output : call.outputs) {
      std::erase_if(output->faults, settled);
      for (const auto& fault : faults)
        if (std::find(output->faults.begin(), output->faults.end(), fault) == output->faults.end())
          output->faults.push_back(fault);
    }
  }

  void clear_blocks() {
    blocks_.clear([this](void* block) { cudaFreeAsync(block, stream_); });
  }

  cudaError_t try_record(cudaEvent_t& event) {
    {
      std::lock_guard lock(mutex_);
      if (!events_.empty()) {
        event = events_.back();
        events_.pop_back();
      }
    }
    // A thread that waits sleeps instead of spinning
    if (!event)
      if (const cudaError_t status =
              cudaEventCreateWithFlags(&event, cudaEventBlockingSync | cudaEventDisableTiming))
        return status;
    return cudaEventRecord(event, stream_);
  }
  cudaEvent_t record() {
    cudaEvent_t event = nullptr;
    HEDDLE_CUDA(try_record(event));
    return event;
  }

  // Lets go of host memory whose copies are done
  void sweep() {
    std::vector<HostBuffer> retired;
    {
      std::lock_guard lock(mutex_);
      retired.swap(retired_);
    }
    for (HostBuffer& buffer : retired) {
      cudaEvent_t event = nullptr;
      // A device that fails here was lost, and uses nothing any more: copies from it say so
      if (try_record(event) == cudaSuccess) uploads_.push_back({event, std::move(buffer), nullptr});
    }
    while (!uploads_.empty() && cudaEventQuery(uploads_.front().event) == cudaSuccess) {
      {
        std::lock_guard lock(mutex_);
        events_.push_back(uploads_.front().event);
      }
      uploads_.pop_front();
    }
  }

  void serve() {
    cudaSetDevice(device.index);
    for (;;) {
      Download download;
      {
        std::unique_lock lock(mutex_);
        filled_.wait(lock, [this] { return stopping_ || !downloads_.empty(); });
        if (downloads_.empty()) return;
        download = std::move(downloads_.front());
        downloads_.pop_front();
      }
      if (download.event) {
        if (download.status == cudaSuccess) download.status = cudaEventSynchronize(download.event);
        std::lock_guard lock(mutex_);
        events_.push_back(download.event);
      }
      const Failure failure = failure_of(download);
      download.from.reset();  // who is answered finds its memory counted
      download.done(failure);
    }
  }

  static Fault* fault_of(const std::shared_ptr<const int>& word) {
    return reinterpret_cast<Fault*>(const_cast<int*>(word.get()));
  }

  Failure failure_of(const Download& download) {
    const StorageRef& from = download.from;
    if (download.status != cudaSuccess) {
      Error error(Code::kCuda, "",
                  concat("the device failed: ", cudaGetErrorString(download.status), " (",
                         cudaGetErrorName(download.status), ")"));
      error.op = from->producer;
      lose(error, from->producer);
      return std::make_shared<Error>(error);
    }
    if (download.failure) return download.failure;
    for (const auto& word : download.faults) {
      Fault* fault = fault_of(word);
      if (*static_cast<const volatile int*>(word.get()) == 0) {
        fault->settled = !fault->captured;
        continue;
      }
      if (fault->failure) return fault->failure;
      auto error = std::make_shared<Error>(Code::kArgument, "", fault->text);
      error->op = fault->op;
      return error;
    }
    return nullptr;
  }

  // After an error that CUDA repeats for ever nothing more can be done on the device
  void lose(const Error& error, const char* op) {
    const cudaError_t status = cudaStreamQuery(stream_);
    if (status == cudaSuccess || status == cudaErrorNotReady) return;
    std::lock_guard lock(mutex_);
    if (!lost_)
      lost_ =
          std::make_shared<Error>(Code::kCuda, "",
                                  concat("device ", text_of(device), " was lost after ", op, " (",
                                         error.text, "); restart the process to use it again"));
  }
  void check_lost() {
    std::lock_guard lock(mutex_);
    if (lost_) throw Error(*lost_);
  }

  const DeviceInfo info_;
  const std::shared_ptr<PinnedPool> pinned_ = std::make_shared<PinnedPool>();
  BlockCache blocks_{0, size_t{4} << 20, size_t{256} << 20};
  const std::shared_ptr<FaultPool> fault_pool_ = std::make_shared<FaultPool>();
  cudaStream_t stream_ = nullptr;
  Counters counters_;
  Scratch scratch_;
  KernelGraphs graphs_;
  std::deque<Upload> uploads_;  // only touched by the environment's thread

  std::mutex mutex_;
  std::condition_variable filled_;
  std::deque<Download> downloads_;
  std::vector<cudaEvent_t> events_;
  Failure lost_;
  bool stopping_ = false;
  std::vector<HostBuffer> retired_;  // pinned tensors that are gone
  std::thread thread_;
};

std::string version(int number) { return concat(number / 1000, ".", number % 1000 / 10); }

// Looks without making a context on any device
CudaStatus look() {
  CudaStatus status;
  status.built = true;
  cudaDriverGetVersion(&status.driver);
  cudaRuntimeGetVersion(&status.runtime);
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  cudaGetLastError();
  const auto because = [&](const char* code, std::string reason, const char* remedy) {
    status.code = code;
    status.reason = std::move(reason);
    status.remedy = remedy;
    return status;
  };
  if (status.driver == 0)
    return because("ERR_NO_DRIVER", "there is no NVIDIA driver",
                   "install the NVIDIA driver, or start the container with its GPUs");
  if (error == cudaErrorInsufficientDriver)
    return because("ERR_DRIVER_TOO_OLD",
                   concat("the NVIDIA driver supports CUDA ", version(status.driver), ", but ",
                          version(status.runtime), " is needed"),
                   "update the NVIDIA driver");
  if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0))
    return because("ERR_NO_DEVICE", "the driver finds no GPU",
                   "check nvidia-smi and CUDA_VISIBLE_DEVICES");
  if (error != cudaSuccess)
    return because("ERR_CUDA", cudaGetErrorString(error), "check nvidia-smi");
  bool usable = false;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, i) != cudaSuccess) continue;
    const int arch = properties.major * 10 + properties.minor;
    status.devices.push_back(
        {properties.name, arch, properties.multiProcessorCount, properties.totalGlobalMem});
    usable |= arch >= 80;
  }
  if (!usable)
    return because("ERR_ARCH_UNSUPPORTED", "no GPU here has compute capability 8.0 or newer",
                   "use a newer GPU");
  return status;
}

CudaStatus status() {
  static const auto* known = new CudaStatus(look());
  return *known;
}

std::shared_ptr<Backend> make(int index) {
  return std::make_shared<CudaBackend>(index, status().devices[static_cast<size_t>(index)]);
}

[[maybe_unused]] const bool registered = register_cuda({status, make});

}  // namespace
}  // namespace heddle
