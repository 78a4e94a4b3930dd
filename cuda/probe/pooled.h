#pragma once
#include "common/context.h"
#include "ops/probe.h"
#include "probe/means.h"

namespace heddle {

// The means that a pooled probe is made of, which wait to be computed
struct Means {
  MeanArgs q, k;

  Means(const Probe& op, CudaContext& context);

  int64_t count() const { return q.count() + k.count(); }
  // What the walks over lines have time for: their warps read 1.5 TB/s, a launch 3.7
  int64_t under_walks() const { return count() * 2 / 5; }
};

// Those from block `first` on
void run_means(const Means& means, int64_t first, CudaContext& context);
// The rest, when they are there. Probabilities are also counted in `bins` [b * hq, kShareBins] of
// core/select.h, unless it is null.
void run_products(const Probe& op, const Means& means, uint32_t* bins, CudaContext& context);

}  // namespace heddle
