#pragma once
#include "attention/split_sm90.h"
#include "common/context.h"
#include "ops/attention.h"

namespace heddle {

// What Hopper's kernels are told of a call, without memory of their own
SplitCall hopper_call(const Attention& op, const CudaContext& context);

// Enqueues what writes the lists of a masked call, into memory that it gets here
void list_units(ForwardCall& call, CudaContext& context);

// Why none of them takes it, or null
const char* declines_hopper(const Attention& op, const CudaContext& context);

// Why those don't that know softmax alone, or null
const char* declines_slots(const Attention& op);

}  // namespace heddle
