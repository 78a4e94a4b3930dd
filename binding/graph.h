#pragma once
#include <napi.h>

namespace heddle {

// From here on the calls of this environment are remembered
Napi::Value begin_graph(const Napi::CallbackInfo& info);
// end_graph(keep): a handle of the graph of all calls since, or nothing if it is not to be kept
Napi::Value end_graph(const Napi::CallbackInfo& info);
Napi::Value replay_graph(const Napi::CallbackInfo& info);
Napi::Value release_graph(const Napi::CallbackInfo& info);

}  // namespace heddle
