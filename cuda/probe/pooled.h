#pragma once
#include "common/context.h"
#include "ops/probe.h"
#include "probe/means.h"

namespace heddle {

// The means that a pooled probe is made of, which wait to be computed
struct Means {
  MeanArgs q, k;
  bool has_k;  // they are there already

  // `in_planes` for run_shares; those of k may be those of other means
  Means(const Probe& op, bool in_planes, CudaContext& context, const Means* other = nullptr);

  int64_t count() const { return q.count() + (has_k ? 0 : k.count()); }
};

void run_means(const Means& means, CudaContext& context);
// The rest, when they are there. Probabilities are also counted in `bins` [b * hq, kShareBins] of
// core/select.h, unless it is null.
void run_products(const Probe& op, const Means& means, uint32_t* bins, CudaContext& context);

const char* declines_shares(const Probe& op, const CudaContext& context);
// The same of means in planes, and only what rows see; of heads whose number in `wanted` is 1,
// unless it is null, and as means of q become `ready`
void run_shares(const Probe& op, const Means& means, uint32_t* bins, const int32_t* wanted,
                const int* ready, CudaContext& context);

}  // namespace heddle
