#pragma once
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/registry.h"

namespace heddle {

class Backend;
// Why a tensor holds nothing useful; null while all is well
using Failure = std::shared_ptr<const Error>;

// Device memory with everything that must stay alive as long as it does. Queued work holds
// references, so the memory goes back once the last tensor is gone and the last work on it is done.
class Storage {
 public:
  Storage(std::shared_ptr<Backend> backend, void* data, size_t nbytes, bool pinned)
      : backend(std::move(backend)), data(data), nbytes(nbytes), pinned(pinned) {}
  ~Storage();
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;

  Failure failure() const;
  // Keeps the first failure
  void poison(Failure failure);
  // What it held is nothing to anybody any more
  void renew();

  const std::shared_ptr<Backend> backend;
  void* const data;
  const size_t nbytes;
  const bool pinned;                               // in memory of the host
  const char* producer = "tensor";                 // the operator that filled it last
  std::vector<std::shared_ptr<const int>> faults;  // words that kernels set when they meet bad data

 private:
  mutable std::mutex mutex_;
  Failure failure_;
};
using StorageRef = std::shared_ptr<Storage>;

// One operator call on its way to a device: the operator's struct and what it reads and writes.
struct Call {
  explicit Call(const Operator& op);
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
  template <class T> T& member(size_t offset) const {
    return *reinterpret_cast<T*>(static_cast<std::byte*>(arguments) + offset);
  }
  // The failure of anything that it reads, if there is one
  Failure inherited() const;
  void poison_outputs(const Failure& failure) const;
  // Whether what an output holds before this call is nothing to it
  bool begins(size_t output) const { return output >= updated || begun >> output & 1; }
  // Forgets what was wrong with outputs before
  void renew_outputs() const;
  // Whether there is nothing to write
  bool empty() const;

  const Operator& op;
  void* const arguments;
  std::vector<StorageRef> inputs, outputs;
  size_t updated = 0;  // so many outputs, the first ones, are read as well
  uint64_t begun = 0;  // but not these, a bit for each: it fills them, or a graph made them for it
  std::vector<std::shared_ptr<const int>> faults;  // words that its own kernels set
};

// Opens once, for one side of a transfer to wait on the other
class Gate {
 public:
  void open(Failure failure);
  Failure wait();

 private:
  std::mutex mutex_;
  std::condition_variable opened_;
  bool is_open_ = false;
  Failure failure_;
};

// Bytes of host memory that any thread may hold
using HostBuffer = std::shared_ptr<void>;

// Calls that were made once, to be made again together
class Graph {
 public:
  virtual ~Graph() = default;
  // Enqueues them all; returns at once
  virtual void replay() = 0;
};

// A point in a device's queue
class Mark {
 public:
  virtual ~Mark() = default;
  // Between an earlier mark of the same device and this one, once the queue has passed both
  virtual double milliseconds_since(const Mark& earlier) const = 0;
};

struct MemoryCount {
  std::atomic<int64_t> tensors{0}, bytes{0}, peak_bytes{0}, pinned_bytes{0};
};

// A device as one environment sees it: an ordered queue of work and the memory it works on. Methods
// are called on the thread of that environment and return at once; call-backs come on any thread.
class Backend : public std::enable_shared_from_this<Backend> {
 public:
  explicit Backend(Device device, double weight = 1) : device(device), weight(weight) {}
  virtual ~Backend() = default;

  // Pinned memory is the host's, and the device reads and writes it through the same pointers
  StorageRef allocate(size_t nbytes, bool pinned = false);
  virtual void launch(std::shared_ptr<Call> call) = 0;
  // The graph holds the memory of all tensors that the calls use
  virtual std::unique_ptr<Graph> capture(std::vector<std::shared_ptr<Call>> calls);
  virtual std::shared_ptr<Mark> mark() = 0;
  virtual HostBuffer host_buffer(size_t nbytes) = 0;
  // Host to device; with a gate, once that has opened
  virtual void upload(StorageRef to, size_t offset, size_t nbytes, HostBuffer from,
                      std::shared_ptr<Gate> gate) = 0;
  // Device to host, after all that was queued before
  virtual void download(StorageRef from, size_t offset, size_t nbytes, HostBuffer to,
                        std::function<void(Failure)> done) = 0;
  // Ends what runs as soon as possible, skips operators that are queued, joins threads. The
  // call-backs of queued copies still come, but none after it returns.
  virtual void stop() = 0;

  const Device device;
  // What the garbage collector, which knows the host's memory alone, hears of a byte of this one
  const double weight;
  MemoryCount memory;

 protected:
  friend class Storage;
  virtual void* allocate_bytes(size_t nbytes) = 0;  // null when there is none
  virtual void release_bytes(void* data, size_t nbytes) noexcept = 0;
  // All memory is the host's where these are not overridden
  virtual void* allocate_pinned(size_t nbytes) { return allocate_bytes(nbytes); }
  virtual void release_pinned(void* data, size_t nbytes) noexcept { release_bytes(data, nbytes); }
};

// Whether this machine could hold so many bytes beside others. More than it has would be granted
// and end the process when it is touched.
bool fits_machine(size_t nbytes, int64_t held);

std::shared_ptr<Backend> make_cpu_backend();

// CUDA announces itself here when it was built in
struct DeviceInfo {
  std::string name;
  int arch = 0;  // 90 for compute capability 9.0
  int processors = 0;
  size_t memory = 0;
};
struct CudaStatus {
  bool built = false;
  std::string code, reason, remedy;  // empty when devices are usable
  int driver = 0, runtime = 0;       // versions as CUDA numbers them, 13000
  std::vector<DeviceInfo> devices;
};
struct CudaEntry {
  CudaStatus (*status)();
  std::shared_ptr<Backend> (*make)(int index);
};
bool register_cuda(CudaEntry entry);
CudaStatus cuda_status();
std::shared_ptr<Backend> make_cuda_backend(int index);

}  // namespace heddle
