#pragma once
#include "common/context.h"
#include "ops/probe.h"
#include "probe/lines_sm90.h"
#include "probe/pooled.h"

namespace heddle {

const char* declines_lines(const Probe& op, const CudaContext& context);
void run_lines(const Probe& op, CudaContext& context);
// Every strip's distances become those of the head
void add_distances(const Probe& op, const LineStrips& strips, CudaContext& context);
const char* declines_lines_sm90(const Probe& op, const CudaContext& context);
// With the means of whole tensors, if asked for, of which q and k are of those of the probe. Only
// masses of keys are written.
LineStrips run_lines_sm90(const Probe& op, const Means* means, CudaContext& context);

}  // namespace heddle
