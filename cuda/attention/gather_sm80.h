#pragma once
#include "common/context.h"
#include "ops/attention.h"

namespace heddle {

struct ForwardArgs;

// Attention over lists of short blocks, for calls that are not declined
void gather_sm80(const Attention& op, const ForwardArgs& call, CudaContext& context);

// Why it cannot take a call, or null
const char* declines_gather_sm80(const Attention& op, const CudaContext& context);

}  // namespace heddle
