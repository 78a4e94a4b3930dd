#pragma once
#include "common/launch.h"
#include "common/sm90.cuh"
#include "lightning/decode.cuh"

namespace heddle {
namespace {

constexpr int kTileThreads = 512, kSize = 128, kSlabs = kSize / kDecodeSlab;

// A row of CTAs has one of the batch, and each one tile of a state
template <class T, bool kTransposed>
__global__ void __launch_bounds__(kTileThreads, 2)
    lightning_decode_sm90_kernel(const __grid_constant__ DecodeCall p) {
  using Tile = DecodeTile<kTileThreads, kSize * kDecodeSlab / 4 / kTileThreads, kTransposed, kSize>;
  __shared__ float smem_q[kSize], smem_k[kSize], smem_v[kSize];
  __shared__ typename Tile::Sums smem_sums;
  const int thread = threadIdx.x, head = blockIdx.x / kSlabs;
  const int64_t b = blockIdx.y;
  Tile tile(kSize, kSize, blockIdx.x % kSlabs * kDecodeSlab, thread);
  sm90::await_previous();
  sm90::let_next_begin();
  const int slot = p.slots[b * p.slots_stride];
  const bool skipped = slot < 0 || slot >= p.pool;
  const int64_t place = static_cast<int64_t>(skipped ? 0 : slot) * p.heads + head;
  float* const state = p.states + place * (kSize * kSize);
  if (!skipped) tile.load_vectors(state);
  const auto load = [&](const DecodeRows& x) {
    const int64_t at = b * x.strides[0] + head * x.strides[2] + thread * x.strides[3];
    return to_float(static_cast<const T*>(x.data)[at]);
  };
  float q = 0, k = 0, v = 0;
  if (thread < kSize) q = load(p.q), k = load(p.k), v = load(p.v);
  // not before: it is the same in all threads, and the compiler has them wait for it at once
  const float decay = expf(-p.slopes[head * p.slopes_stride]);
  if (blockIdx.x == 0 && b == 0) {  // while all of this is on its way
    const bool bad = __syncthreads_or(p.finds_bad(thread, kTileThreads));
    if (thread == 0) *p.fault = bad;
  }
  if (thread < kSize) {
    smem_q[thread] = q;
    smem_k[thread] = k;
    smem_v[thread] = skipped ? 0 : v;
  }
  __syncthreads();
  tile.advance(decay, smem_k, smem_v);
  T* const out = static_cast<T*>(p.out) + (b * p.heads + head) * kSize;
  tile.project(smem_q, smem_sums,
               [&](int f, float sum) { out[f] = from_float<T>(skipped ? 0 : p.scale * sum); });
  if (!skipped) tile.store_vectors(state);
}

}  // namespace

template <class T> void launch_decode_sm90(const DecodeCall& call, cudaStream_t stream) {
  const Launch tiles{
      2 * call.heads, kTileThreads, 0, stream, true, false, static_cast<int>(call.batch)};
  call.transposed ? launch<lightning_decode_sm90_kernel<T, true>>(tiles, call)
                  : launch<lightning_decode_sm90_kernel<T, false>>(tiles, call);
}

}  // namespace heddle
