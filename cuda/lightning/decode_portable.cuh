#pragma once
#include "lightning/decode.cuh"

namespace heddle {
namespace {

constexpr int kTileThreads = 256;

// A CTA owns one tile of a state, which stays in registers from the first token to the last. All
// reads are on their way before the first is used: with 8 pieces 128 KB to a multiprocessor. What
// registers do not hold passes through L2 as states do, so nothing may spill.
template <class T, int kPieces, bool kTransposed, bool kVectors>
__global__ void __launch_bounds__(kTileThreads, kPieces == 8 ? 4 : 2)
    lightning_decode_kernel(DecodeCall p) {
  using Tile = DecodeTile<kTileThreads, kPieces, kTransposed, 0>;
  __shared__ float smem_q[kTileThreads], smem_k[kTileThreads], smem_v[kTileThreads];
  __shared__ typename Tile::Sums smem_sums;
  const int slabs = (p.e + kDecodeSlab - 1) / kDecodeSlab;
  const int index = blockIdx.x / slabs, state_head = index % p.heads_state;
  const int64_t size = static_cast<int64_t>(p.d) * p.e;
  const int group = p.heads / p.heads_state;
  const int64_t b = index / p.heads_state;
  const int thread = threadIdx.x;
  const int64_t slot = p.slots[b * p.slots_stride];
  const float slope = p.slopes[state_head * p.slopes_stride];
  const bool skipped = slot < 0 || slot >= p.pool;
  const float decay = expf(-slope);
  Tile tile(p.d, p.e, blockIdx.x % slabs * kDecodeSlab, thread);
  const auto store = [&](float* to) {
    if constexpr (kVectors)
      tile.store_vectors(to);
    else
      tile.each(to, [&](const float(&piece)[4], int count, float* at) {
        for (int j = 0; j < 4; ++j)
          if (j < count) at[j] = piece[j];
      });
  };
  float* const state = p.states + ((skipped ? 0 : slot) * p.heads_state + state_head) * size;
  if (!skipped && kVectors)
    tile.load_vectors(state);
  else if (!skipped)
    tile.each(state, [&](float(&piece)[4], int count, const float* at) {
      for (int j = 0; j < 4; ++j)
        if (j < count) piece[j] = at[j];
    });
  if (blockIdx.x == 0) {  // while the state is on its way
    const bool bad = __syncthreads_or(p.finds_bad(thread, kTileThreads));
    if (thread == 0) *p.fault = bad;
  }

  for (int t = 0; t < p.tokens; ++t)
    for (int member = 0; member < group; ++member) {
      const int head = state_head * group + member;
      // a value for every thread, zeros behind the last
      const auto load = [&](const DecodeRows& x, int count) {
        return thread < count
                   ? to_float(static_cast<const T*>(x.data)[x.offset(b, t, head, thread)])
                   : 0;
      };
      const float q = load(p.q, p.d), k = load(p.k, p.d), v = load(p.v, p.e);
      __syncthreads();
      smem_q[thread] = q;
      smem_k[thread] = k;
      smem_v[thread] = skipped ? 0 : v;
      __syncthreads();
      if (member == 0) {
        tile.advance(decay, smem_k, smem_v);
        if (p.all_states)
          store(p.all_states + ((b * p.tokens + t) * p.heads_state + state_head) * size);
      }
      T* const out = static_cast<T*>(p.out) + ((b * p.tokens + t) * p.heads + head) * p.e;
      tile.project(smem_q, smem_sums, [&](int f, float sum) {
        if (f < p.e) out[f] = from_float<T>(skipped ? 0 : p.scale * sum);
      });
    }
  if (!skipped) store(state);
}

}  // namespace
}  // namespace heddle
