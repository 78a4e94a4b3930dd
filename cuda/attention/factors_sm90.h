#pragma once
#include "attention/forward_sm90.h"
#include "common/context.h"

namespace heddle {

// Rows of these sizes have one over their lengths written to call.slots, for cosines. The word that
// comes back is not 0 if some row has numbers so large or small that f32 products of them may
// leave its range.
const int* row_factors(ForwardCall& call, CudaContext& context);

// The same, and what Passes takes is written
const int* cosine_rows(const ForwardCall& call, const CosineRows& rows, CudaContext& context);

}  // namespace heddle
