#pragma once
#include "common/context.h"
#include "ops/probe.h"

namespace heddle {

void run_pooled(const Probe& op, CudaContext& context);

}  // namespace heddle
