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
// The rest, when they are there. Probabilities are also counted in `bins` [b * hq, kShareBins] of
// core/select.h, unless it is null.
void run_products(const Probe& op, const Means& means, uint32_t* bins, CudaContext& context);

}  // namespace heddle
