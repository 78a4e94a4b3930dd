#pragma once
#include "common/context.h"
#include "ops/probe.h"
#include "probe/lines_sm90.h"
#include "probe/pooled.h"

namespace heddle {

// Whether rows have elements of 16 bits, aligned to 16 bytes, and whether Hopper's copies can step
// through both
const char* declines_wide(const Probe& op);
const char* declines_copies(const Probe& op);
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

// Calls run<kType, kD>() for the smallest size that has room
template <class Run> void dispatch_copied(const Probe& op, const Run& run) {
  const bool wide = op.q.shape[3] > 64;
  if (op.q.dtype == DType::kBF16)
    wide ? run.template operator()<DType::kBF16, 128>()
         : run.template operator()<DType::kBF16, 64>();
  else
    wide ? run.template operator()<DType::kF16, 128>() : run.template operator()<DType::kF16, 64>();
}

}  // namespace heddle
