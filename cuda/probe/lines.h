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
// Of both walks, the first of which averages blocks as well, and leaves bands if they are asked for
LinesCall lines_sm90(const Probe& op, const MeanArgs (&means)[2], bool bands, CudaContext& context);
void run_stats_sm90(const LinesCall& call, CudaContext& context);
// Of distances those of strips are written
void run_lines_sm90(const LinesCall& call, CudaContext& context);

}  // namespace heddle
