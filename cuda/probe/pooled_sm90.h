#pragma once
#include <cuda_runtime.h>

#include "ops/probe.h"
#include "probe/means.h"

namespace heddle {

// Shares of every row of blocks, up to its diagonal, and how many are in which bin
struct PooledCall {
  Probe op;
  MeanArgs mean_q, mean_k;  // as planes
  uint32_t* bins;           // [b * hq, kShareBins] of core/select.h, or null
  const int32_t* wanted;    // [b * hq], or null: heads without a 1 are left out
  // Then means of q may be on their way: how many of kReadyBlocks are there
  const int* ready;
};

// An instantiation file for each size
template <int kD> void launch_pooled_sm90(const PooledCall& call, cudaStream_t stream);

}  // namespace heddle
