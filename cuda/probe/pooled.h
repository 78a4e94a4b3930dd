#pragma once
#include "common/context.h"
#include "ops/probe.h"
#include "probe/means.h"

namespace heddle {

// The means that a pooled probe is made of, which wait to be computed
struct Means {
  MeanArgs q, k;

  Means(const Probe& op, CudaContext& context);
};

void run_means(const Means& means, CudaContext& context);
// The rest, when they are there
void run_products(const Probe& op, const Means& means, CudaContext& context);

}  // namespace heddle
