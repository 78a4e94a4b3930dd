#pragma once
#include "common/launch.h"
#include "common/sm90.cuh"
#include "lightning/decode.cuh"

namespace heddle {
namespace {

constexpr int kTileThreads = 512, kSize = 128;

// Two CTAs have half of a state each
template <class T, bool kTransposed>
__global__ void __launch_bounds__(kTileThreads, kTransposed ? 3 : 4)
    lightning_decode_sm90_kernel(const __grid_constant__ DecodeCall p) {
  sm90::await_previous();
  sm90::let_next_begin();
  decode_tile<T, DecodeTile<kTileThreads, 4, kTransposed, kSize>, true, true>(
      p, blockIdx.y, blockIdx.x / 2, blockIdx.x % 2 * kDecodeSlab,
      blockIdx.x == 0 && blockIdx.y == 0);
}

}  // namespace

template <class T> void launch_decode_sm90(const DecodeCall& call, cudaStream_t stream) {
  const Launch tiles{
      2 * call.heads, kTileThreads, 0, stream, true, false, static_cast<int>(call.batch)};
  call.transposed ? launch<lightning_decode_sm90_kernel<T, true>>(tiles, call)
                  : launch<lightning_decode_sm90_kernel<T, false>>(tiles, call);
}

}  // namespace heddle
