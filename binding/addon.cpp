#include <napi.h>

#include <new>

#include "binding/call.h"
#include "binding/environment.h"
#include "binding/graph.h"
#include "binding/tensors.h"

namespace heddle {
namespace {

// The one place where native exceptions become JavaScript errors
template <Napi::Value (*Function)(const Napi::CallbackInfo&)>
Napi::Value guarded(const Napi::CallbackInfo& info) {
  Environment& environment = Environment::of(info.Env());
  try {
    return Function(info);
  } catch (const Error& error) {
    throw environment.to_js(error);
  } catch (const std::bad_alloc&) {
    throw environment.to_js(Error(Code::kMemory, "", "ran out of host memory"));
  }
}

// init(the error class): called once by lib before anything else; gives what `run` shares with it
Napi::Value init(const Napi::CallbackInfo& info) {
  Environment& environment = Environment::of(info.Env());
  environment.error_class = Napi::Persistent(info[0].As<Napi::Function>());
  return environment.share_memory(info.Env());
}

template <Napi::Value (*Function)(const Napi::CallbackInfo&)>
void add(Napi::Object exports, const char* name) {
  exports[name] = Napi::Function::New<guarded<Function>>(exports.Env(), name);
}

Napi::Object load(Napi::Env env, Napi::Object exports) {
  env.SetInstanceData(new Environment(env));
  add<init>(exports, "init");
  add<operators_to_js>(exports, "operators");
  add<run>(exports, "run");
  add<explain>(exports, "explain");
  add<make_empty>(exports, "empty");
  add<make_from>(exports, "from");
  add<make_view>(exports, "view");
  add<transfer>(exports, "transfer");
  add<write>(exports, "write");
  add<read>(exports, "read");
  add<check_reading>(exports, "checkReading");
  add<read_sync>(exports, "readSync");
  add<finish>(exports, "finish");
  add<begin_span>(exports, "beginSpan");
  add<end_span>(exports, "endSpan");
  add<release>(exports, "release");
  add<begin_graph>(exports, "beginGraph");
  add<end_graph>(exports, "endGraph");
  add<replay_graph>(exports, "replayGraph");
  add<release_graph>(exports, "releaseGraph");
  add<memory>(exports, "memory");
  add<cuda>(exports, "cuda");
  return exports;
}

}  // namespace
}  // namespace heddle

static Napi::Object heddle_load(Napi::Env env, Napi::Object exports) {
  return heddle::load(env, exports);
}
NODE_API_MODULE(heddle, heddle_load)
