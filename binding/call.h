#pragma once
#include <napi.h>

namespace heddle {

// The operators' schemas, in the order that `run` numbers them
Napi::Value operators_to_js(const Napi::CallbackInfo& info);

// run(operator, ...arguments in the schema's order, outputs left out): [handle, dtype, rank,
// ...shape] of each output in turn, -1 for one that was not asked for
Napi::Value run(const Napi::CallbackInfo& info);

// explain(operator, ...arguments as for run): {variant, declined: [{variant, reason}]} of the call
// that run would make
Napi::Value explain(const Napi::CallbackInfo& info);

}  // namespace heddle
