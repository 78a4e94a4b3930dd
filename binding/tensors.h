#pragma once
#include <napi.h>

namespace heddle {

// Devices cross the boundary as (kind, index), dtypes as their number, shapes as arrays of numbers.

Napi::Value make_empty(
    const Napi::CallbackInfo& info);  // (dtype, shape, kind, index, pinned): handle
Napi::Value make_from(
    const Napi::CallbackInfo& info);  // (bytes, dtype, shape, kind, index, pinned): handle
Napi::Value make_view(const Napi::CallbackInfo& info);  // (handle, offset, shape, strides): handle
Napi::Value transfer(
    const Napi::CallbackInfo& info);  // (handle, kind, index): handle; contiguous only
Napi::Value write(const Napi::CallbackInfo& info);  // (handle, bytes); contiguous only
Napi::Value read(
    const Napi::CallbackInfo& info);  // (handle): promise of an ArrayBuffer; contiguous only
Napi::Value read_sync(const Napi::CallbackInfo& info);  // (handle): ArrayBuffer; contiguous only
// (): throws what reading would reject with while a graph is being made
Napi::Value check_reading(const Napi::CallbackInfo& info);
Napi::Value finish(const Napi::CallbackInfo& info);      // (kind, index): promise
Napi::Value begin_span(const Napi::CallbackInfo& info);  // (kind, index): handle
Napi::Value end_span(const Napi::CallbackInfo& info);    // (handle): promise of milliseconds
Napi::Value release(const Napi::CallbackInfo& info);     // (handle)
Napi::Value memory(
    const Napi::CallbackInfo& info);  // (kind, index): [tensors, bytes, peak bytes, pinned bytes]
Napi::Value cuda(const Napi::CallbackInfo& info);  // what is known of CUDA here

}  // namespace heddle
