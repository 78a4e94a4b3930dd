#include "binding/tensors.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "binding/environment.h"

namespace heddle {
namespace {

double number(const Napi::Value& value) { return value.As<Napi::Number>().DoubleValue(); }

constexpr double kLargest = 9007199254740991;  // beyond it doubles skip integers

int64_t integer(const Napi::Value& value, double most, const char* argument) {
  const double given = number(value);
  HEDDLE_CHECK(given >= 0 && given <= most && given == std::floor(given), kArgument, argument,
               argument, " must be an integer from 0 on, got ", given);
  return static_cast<int64_t>(given);
}

Device device_of(const Napi::Value& kind, const Napi::Value& index) {
  const double which = number(kind), at = number(index);
  HEDDLE_CHECK((which == 0 || which == 1) && at >= 0 && at < 1024 && at == std::floor(at), kDevice,
               "device", "there is no such device");
  return {static_cast<Device::Kind>(which), static_cast<int>(at)};
}

DType dtype_of(const Napi::Value& value) {
  return static_cast<DType>(integer(value, kDTypeCount - 1, "dtype"));
}

// A contiguous tensor's view, with the product of its sizes checked
Tensor shape_of(const Napi::Value& value, DType dtype, Device device) {
  const auto shape = value.As<Napi::Array>();
  Tensor view;
  view.dtype = dtype;
  view.device = device;
  const uint32_t rank = shape.Length();
  HEDDLE_CHECK(rank <= kMaxRank, kShape, "shape", "shape must have at most ", kMaxRank,
               " dimensions, got ", rank);
  view.rank = static_cast<int>(rank);
  bool overflow = false;
  int64_t product = static_cast<int64_t>(size_of(dtype)), count = 1;
  for (int i = 0; i < view.rank; ++i) {
    view.shape[i] = integer(shape[static_cast<uint32_t>(i)], kLargest, "shape");
    overflow |= __builtin_mul_overflow(product, std::max<int64_t>(view.shape[i], 1), &product);
  }
  HEDDLE_CHECK(!overflow, kShape, "shape", "shape ", text_of(view),
               " has more bytes than can be addressed");
  for (int i = view.rank - 1; i >= 0; --i) {
    view.strides[i] = count;
    count *= view.shape[i];
  }
  return view;
}

size_t bytes_of(const Tensor& view) {
  return static_cast<size_t>(view.size()) * size_of(view.dtype);
}

size_t offset_of(const TensorEntry& entry) {
  return static_cast<size_t>(static_cast<char*>(entry.view.data) -
                             static_cast<char*>(entry.storage->data));
}

const TensorEntry& contiguous(Environment& environment, const Napi::Value& handle) {
  const TensorEntry& entry = environment.entry(number(handle));
  HEDDLE_CHECK(entry.view.contiguous(), kArgument, "",
               "only a contiguous tensor can be copied to or from");
  return entry;
}

struct Bytes {
  const void* data;
  size_t size;
};

// The bytes under a typed array, from the engine's own record of it rather than from properties
// that a script may redefine. The headers' element sizes stop before float16, so they are spelled
// out.
Bytes bytes_of(const Napi::Value& value) {
  bool is_array = false, is_plain = false, is_detached = false;
  napi_is_typedarray(value.Env(), value, &is_array);
  HEDDLE_CHECK(is_array, kArgument, "data", "data must be a typed array");
  napi_typedarray_type type;
  size_t length, offset;
  void* data;
  napi_value buffer;
  napi_get_typedarray_info(value.Env(), value, &type, &length, &data, &buffer, &offset);
  napi_is_arraybuffer(value.Env(), buffer, &is_plain);
  HEDDLE_CHECK(is_plain, kArgument, "data", "data must not be shared memory; copy it first");
  napi_is_detached_arraybuffer(value.Env(), buffer, &is_detached);
  HEDDLE_CHECK(!is_detached, kArgument, "data", "data must not be detached");
  constexpr size_t kElementSizes[] = {1, 1, 1, 2, 2, 4, 4, 4, 8, 8, 8, 2};
  HEDDLE_CHECK(static_cast<size_t>(type) < std::size(kElementSizes), kArgument, "data",
               "data has elements of an unknown kind");
  return {data, data ? length * kElementSizes[type] : 0};
}

HostBuffer copy_of(Backend& backend, const Bytes& bytes) {
  HostBuffer buffer = backend.host_buffer(bytes.size);
  if (bytes.size) std::memcpy(buffer.get(), bytes.data, bytes.size);
  return buffer;
}

// Hands bytes to JavaScript, without a copy where the runtime allows
Napi::ArrayBuffer to_js(Napi::Env env, const HostBuffer& buffer, size_t nbytes) {
  constexpr size_t kWorthSharing = 4096;
  if (nbytes >= kWorthSharing) {
    napi_value value;
    auto* owner = new HostBuffer(buffer);
    const auto drop = [](napi_env, void*, void* hint) { delete static_cast<HostBuffer*>(hint); };
    if (napi_create_external_arraybuffer(env, buffer.get(), nbytes, drop, owner, &value) == napi_ok)
      return Napi::ArrayBuffer(env, value);
    delete owner;
  }
  Napi::ArrayBuffer copy = Napi::ArrayBuffer::New(env, nbytes);
  if (nbytes) std::memcpy(copy.Data(), buffer.get(), nbytes);
  return copy;
}

// Pinned memory is scarce, so what JavaScript may keep for long leaves it on the thread that
// received it
HostBuffer unpinned(const HostBuffer& buffer, size_t nbytes) {
  HostBuffer plain(std::malloc(std::max<size_t>(nbytes, 1)), std::free);
  if (!plain) throw std::bad_alloc();
  std::memcpy(plain.get(), buffer.get(), nbytes);
  return plain;
}

}  // namespace

Napi::Value make_empty(const Napi::CallbackInfo& info) {
  Environment& environment = Environment::of(info.Env());
  Tensor view = shape_of(info[1], dtype_of(info[0]), device_of(info[2], info[3]));
  StorageRef storage =
      environment.backend(view.device).allocate(bytes_of(view), info[4].ToBoolean());
  view.data = storage->data;
  if (environment.recording) environment.recording->made.insert(storage);
  return Napi::Number::New(info.Env(), environment.add(std::move(storage), view, true));
}

Napi::Value make_from(const Napi::CallbackInfo& info) {
  Environment& environment = Environment::of(info.Env());
  const Bytes bytes = bytes_of(info[0]);
  Tensor view = shape_of(info[2], dtype_of(info[1]), device_of(info[3], info[4]));
  HEDDLE_CHECK(bytes.size == bytes_of(view), kShape, "data", "data must have ", view.size(),
               " elements for shape ", text_of(view), ", got ", bytes.size / size_of(view.dtype));
  Backend& backend = environment.backend(view.device);
  StorageRef storage = backend.allocate(bytes.size, info[5].ToBoolean());
  view.data = storage->data;
  if (view.device.kind == Device::kCpu) {
    if (bytes.size)
      std::memcpy(storage->data, bytes.data, bytes.size);  // nothing can be queued on it yet
  } else {
    backend.upload(storage, 0, bytes.size, copy_of(backend, bytes), nullptr);
  }
  return Napi::Number::New(info.Env(), environment.add(std::move(storage), view, true));
}

Napi::Value make_view(const Napi::CallbackInfo& info) {
  Environment& environment = Environment::of(info.Env());
  // A copy: reading the lists can run a script, which can release the tensor
  const TensorEntry base = environment.entry(number(info[0]));
  Tensor view = shape_of(info[2], base.view.dtype, base.view.device);
  const auto strides = info[3].As<Napi::Array>();
  // The first and the last element must lie inside the memory
  const auto element = static_cast<int64_t>(size_of(view.dtype));
  int64_t last =
      integer(info[1], kLargest, "offset") + static_cast<int64_t>(offset_of(base)) / element;
  view.data = static_cast<char*>(base.storage->data) + last * element;
  bool fits = true;
  const bool any = view.size() > 0;
  for (int i = 0; i < view.rank; ++i) {
    view.strides[i] = integer(strides[static_cast<uint32_t>(i)], kLargest, "strides");
    int64_t reach;
    if (any)
      fits = fits && !__builtin_mul_overflow(view.strides[i], view.shape[i] - 1, &reach) &&
             !__builtin_add_overflow(last, reach, &last);
  }
  const int64_t held = static_cast<int64_t>(base.storage->nbytes) / element;
  fits = fits && (any ? last < held : last <= held);
  HEDDLE_CHECK(fits, kShape, "shape", "the view reaches outside its tensor");
  return Napi::Number::New(info.Env(), environment.add(base.storage, view, false));
}

Napi::Value transfer(const Napi::CallbackInfo& info) {
  Environment& environment = Environment::of(info.Env());
  environment.not_recording();
  const TensorEntry from = contiguous(environment, info[0]);
  Tensor view = from.view;
  view.device = device_of(info[1], info[2]);
  const size_t nbytes = bytes_of(view);
  Backend& target = environment.backend(view.device);
  StorageRef storage = target.allocate(nbytes);
  view.data = storage->data;
  // Host memory that the copy engines can reach belongs to whichever side has such engines
  Backend& engine = view.device.kind == Device::kCuda ? target : *from.storage->backend;
  const HostBuffer buffer = engine.host_buffer(nbytes);
  const auto gate = std::make_shared<Gate>();
  from.storage->backend->download(from.storage, offset_of(from), nbytes, buffer,
                                  [gate](Failure failure) { gate->open(std::move(failure)); });
  target.upload(storage, 0, nbytes, buffer, gate);
  return Napi::Number::New(info.Env(), environment.add(std::move(storage), view, true));
}

Napi::Value write(const Napi::CallbackInfo& info) {
  Environment& environment = Environment::of(info.Env());
  environment.not_recording();
  const TensorEntry& to = contiguous(environment, info[0]);
  const Bytes bytes = bytes_of(info[1]);
  HEDDLE_CHECK(bytes.size == bytes_of(to.view), kShape, "data", "data must have ",
               bytes_of(to.view), " bytes, got ", bytes.size);
  Backend& backend = *to.storage->backend;
  backend.upload(to.storage, offset_of(to), bytes.size, copy_of(backend, bytes), nullptr);
  return info.Env().Undefined();
}

Napi::Value read(const Napi::CallbackInfo& info) {
  Environment& environment = Environment::of(info.Env());
  environment.not_recording();
  const TensorEntry& from = contiguous(environment, info[0]);
  const size_t nbytes = bytes_of(from.view);
  Backend& backend = *from.storage->backend;
  const HostBuffer buffer = backend.host_buffer(nbytes);
  const bool pinned = backend.device.kind == Device::kCuda;
  const auto deferred = Napi::Promise::Deferred::New(info.Env());
  Environment::Pending* pending = environment.defer(deferred);
  backend.download(
      from.storage, offset_of(from), nbytes, buffer, [=, &environment](Failure failure) {
        HostBuffer bytes = buffer;
        try {
          if (!failure && pinned) bytes = unpinned(buffer, nbytes);
        } catch (const std::bad_alloc&) {
          failure = std::make_shared<Error>(
              Code::kMemory, "", concat("cannot allocate ", nbytes, " bytes of host memory"));
        }
        pending->post([=, &environment](Napi::Env env, Napi::Promise::Deferred promise) {
          if (failure) {
            promise.Reject(environment.to_js(*failure).Value());
          } else {
            promise.Resolve(to_js(env, bytes, nbytes));
          }
        });
      });
  return deferred.Promise();
}

Napi::Value check_reading(const Napi::CallbackInfo& info) {
  Environment::of(info.Env()).not_recording();
  return info.Env().Undefined();
}

Napi::Value read_sync(const Napi::CallbackInfo& info) {
  Environment& environment = Environment::of(info.Env());
  environment.not_recording();
  const TensorEntry& from = contiguous(environment, info[0]);
  const size_t nbytes = bytes_of(from.view);
  Backend& backend = *from.storage->backend;
  const HostBuffer buffer = backend.host_buffer(nbytes);
  const auto gate = std::make_shared<Gate>();
  backend.download(from.storage, offset_of(from), nbytes, buffer,
                   [gate](Failure failure) { gate->open(std::move(failure)); });
  if (const Failure failure = gate->wait()) throw Error(*failure);
  return to_js(info.Env(), backend.device.kind == Device::kCuda ? unpinned(buffer, nbytes) : buffer,
               nbytes);
}

namespace {

// A promise of what `result` says once all is done that the device was given so far
template <class Result>
Napi::Value when_done(Environment& environment, Backend& backend, const Napi::CallbackInfo& info,
                      Result result) {
  const auto deferred = Napi::Promise::Deferred::New(info.Env());
  Environment::Pending* pending = environment.defer(deferred);
  backend.download(
      backend.allocate(0), 0, 0, backend.host_buffer(0), [=, &environment](Failure failure) {
        pending->post([=, &environment](Napi::Env env, Napi::Promise::Deferred promise) {
          try {
            if (failure) throw Error(*failure);
            promise.Resolve(result(env));
          } catch (const Error& error) {
            promise.Reject(environment.to_js(error).Value());
          }
        });
      });
  return deferred.Promise();
}

}  // namespace

Napi::Value finish(const Napi::CallbackInfo& info) {
  Environment& environment = Environment::of(info.Env());
  environment.not_recording();
  return when_done(environment, environment.backend(device_of(info[0], info[1])), info,
                   [](Napi::Env env) { return env.Undefined(); });
}

Napi::Value begin_span(const Napi::CallbackInfo& info) {
  Environment& environment = Environment::of(info.Env());
  environment.not_recording();
  const Device device = device_of(info[0], info[1]);
  static std::atomic<int64_t> count{0};
  const auto handle = static_cast<double>(++count);
  environment.spans[handle] = {device, environment.backend(device).mark()};
  return Napi::Number::New(info.Env(), handle);
}

Napi::Value end_span(const Napi::CallbackInfo& info) {
  Environment& environment = Environment::of(info.Env());
  environment.not_recording();
  const auto span = environment.spans.extract(number(info[0]));
  HEDDLE_CHECK(!span.empty(), kDisposed, "", "this span has ended");
  const auto [device, from] = span.mapped();
  Backend& backend = environment.backend(device);
  const std::shared_ptr<Mark> to = backend.mark();
  return when_done(environment, backend, info, [from = from, to](Napi::Env env) -> Napi::Value {
    return Napi::Number::New(env, to->milliseconds_since(*from));
  });
}

Napi::Value release(const Napi::CallbackInfo& info) {
  Environment::of(info.Env()).release(number(info[0]));
  return info.Env().Undefined();
}

Napi::Value memory(const Napi::CallbackInfo& info) {
  const MemoryCount& count =
      Environment::of(info.Env()).backend(device_of(info[0], info[1])).memory;
  Napi::Array out = Napi::Array::New(info.Env(), 4);
  out[0u] = static_cast<double>(count.tensors.load());
  out[1u] = static_cast<double>(count.bytes.load());
  out[2u] = static_cast<double>(count.peak_bytes.load());
  out[3u] = static_cast<double>(count.pinned_bytes.load());
  return out;
}

Napi::Value cuda(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const CudaStatus status = cuda_status();
  Napi::Object out = Napi::Object::New(env);
  out["built"] = status.built;
  out["code"] = status.code;
  out["text"] = status.reason;
  out["remedy"] = status.remedy;
  out["driver"] = status.driver;
  out["runtime"] = status.runtime;
  Napi::Array devices = Napi::Array::New(env, status.devices.size());
  for (size_t i = 0; i < status.devices.size(); ++i) {
    const DeviceInfo& device = status.devices[i];
    Napi::Object entry = Napi::Object::New(env);
    entry["name"] = device.name;
    entry["arch"] = device.arch;
    entry["processors"] = device.processors;
    entry["memory"] = static_cast<double>(device.memory);
    devices[static_cast<uint32_t>(i)] = entry;
  }
  out["devices"] = devices;
  return out;
}

}  // namespace heddle
