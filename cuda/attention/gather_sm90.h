#pragma once
#include "attention/gather_lists.h"
#include "attention/split_sm90.h"

namespace heddle {

// A call over lists of blocks of at least 8 keys that all heads of a group share
struct GatherCall : SplitCall {
  GatherLists blocks;
};

// Why the kernel cannot take a call whose mask has such lists, or null
const char* declines_gather_sm90(const GatherCall& call);

void gather_sm90(const GatherCall& call, cudaStream_t stream);

// What gather_sm90 picks from
template <DType kType, int kD> void launch_gather_sm90(const GatherCall& call, cudaStream_t stream);

}  // namespace heddle
