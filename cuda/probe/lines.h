#pragma once
#include "common/context.h"
#include "ops/probe.h"

namespace heddle {

const char* declines_lines(const Probe& op, const CudaContext& context);
void run_lines(const Probe& op, CudaContext& context);
const char* declines_lines_sm90(const Probe& op, const CudaContext& context);
void run_lines_sm90(const Probe& op, CudaContext& context);

}  // namespace heddle
