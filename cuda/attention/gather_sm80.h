#pragma once
#include "attention/gather_lists.h"
#include "common/context.h"
#include "ops/attention.h"

namespace heddle {

struct ForwardArgs;

// Of a mask that has some
GatherLists lists_of(const Attention& op);

// Attention over lists of short blocks, for calls that are not declined
void gather_sm80(const Attention& op, const ForwardArgs& call, CudaContext& context);

// Why it cannot take a call, or null
const char* declines_gather_sm80(const Attention& op, const CudaContext& context);

}  // namespace heddle
