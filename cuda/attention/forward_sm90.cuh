#pragma once
#include <algorithm>
#include <cmath>

#include "attention/forward_sm90.h"
#include "common/sm90.cuh"
#include "common/tensor_map.h"
#include "common/tile.cuh"

// Attention, dense or causal, f16 or bf16, one head size for q, k, v and out.
//
//   S[q,k] = scale * Q[q,d] * K[k,d]       where k <= q + sk - sq if causal
//   out    = softmax(S) V                  lse = ln(sum(exp(S)))
//
// A tile is 64 rows of q per computing warpgroup, 128 or 192 in all, of one head; keys and values
// pass by in tiles of 80 to 176 rows, from the last to the first, so that the masked ones come
// first. Warpgroup 0 loads: q once per tile, k and v through rings of two stages. The others
// compute, each on its own rows: the scores of key tile j and the values of tile j - 1 are
// multiplied at the same time, and softmax of tile j runs under the second product and under those
// of the other warpgroups, which take turns at issuing. CTAs stay and walk over tiles.
namespace heddle {
namespace {

struct ForwardTile {
  int warpgroups, keys;
};

constexpr ForwardTile forward_tile(int head_dim, bool causal) {
  // exp2 bounds d = 64: a third warpgroup leaves fewer clocks in which no product runs
  if (head_dim == 64) return {3, 128};
  // the more keys, the less often q is read again, but the more lie beyond the diagonal
  if (head_dim == 128) return {2, causal ? 128 : 176};
  // what fits into shared memory with two stages
  return {2, 80};
}

template <int kHeadDim, bool kCausal> struct Forward {
  static constexpr ForwardTile kTile = forward_tile(kHeadDim, kCausal);
  static constexpr int kWarpgroups = kTile.warpgroups, kStages = 2;
  static constexpr int kQueries = 64 * kWarpgroups, kKeys = kTile.keys;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  // sums to the 512 registers per lane that a CTA has
  static constexpr int kLoadRegisters = kWarpgroups == 3 ? 32 : 24;
  static constexpr int kComputeRegisters = kWarpgroups == 3 ? 160 : 240;

  struct Smem {
    sm90::Tile<kQueries, kHeadDim> q;  // out passes through here too
    sm90::Tile<kKeys, kHeadDim> k[kStages], v[kStages];
    sm90::Barrier q_full, q_empty;
    sm90::Barrier k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  };
};

struct ForwardArgs {
  int sq, sk, hq;
  int group;       // query heads per kv head
  int head_tiles;  // tiles of one head
  int tiles;       // of all heads and batches
  float scale_log2;
  float* lse;  // [b, hq, sq]
};

template <DType kType, int kHeadDim, bool kCausal>
__global__ void __launch_bounds__((Forward<kHeadDim, kCausal>::kThreads), 1)
    forward_sm90_kernel(const __grid_constant__ sm90::TensorMap gmem_q,
                        const __grid_constant__ sm90::TensorMap gmem_k,
                        const __grid_constant__ sm90::TensorMap gmem_v,
                        const __grid_constant__ sm90::TensorMap gmem_out, const ForwardArgs args) {
  using namespace sm90;
  using Shape = Forward<kHeadDim, kCausal>;
  constexpr int kKeys = Shape::kKeys, kStages = Shape::kStages, kWarpgroups = Shape::kWarpgroups;
  auto& smem = shared_memory<typename Shape::Smem>();
  // the same in all lanes, which the compiler cannot know of threadIdx
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);

  if (threadIdx.x == 0) {
    smem.q_full.init(1);
    smem.q_empty.init(kWarpgroups);
    for (int stage = 0; stage < kStages; ++stage) {
      smem.k_full[stage].init(1);
      smem.v_full[stage].init(1);
      smem.k_empty[stage].init(kWarpgroups * 4);
      smem.v_empty[stage].init(kWarpgroups * 4);
    }
    fence_barrier_init();
  }
  __syncthreads();

  // causal aligns to the bottom right: row i sees keys up to i + diagonal
  const int diagonal = args.sk - args.sq;
  struct Work {
    int row, head, batch, key_tiles;
  };
  // the tiles of a head follow each other, the longest first; a tile that sees no key still visits
  // one, fully masked
  auto work_at = [&](int index) {
    const int row = (args.head_tiles - 1 - index % args.head_tiles) * Shape::kQueries;
    const int head = index / args.head_tiles % args.hq;
    const int visible = kCausal ? min(args.sk, row + Shape::kQueries + diagonal) : args.sk;
    return Work{row, head, index / args.head_tiles / args.hq,
                max(1, (visible + kKeys - 1) / kKeys)};
  };

  if (warpgroup == 0) {
    lower_registers<Shape::kLoadRegisters>();
    if (threadIdx.x < 32 && elect_one()) {
      prefetch(gmem_q);
      prefetch(gmem_k);
      prefetch(gmem_v);
      uint32_t visit = 0, loaded = 0;  // tiles of q, and of k and v
      for (int index = blockIdx.x; index < args.tiles; index += gridDim.x, ++visit) {
        const Work work = work_at(index);
        auto load = [&](auto& tiles, Barrier* full, Barrier* empty, const TensorMap& map, int j) {
          const Turn<kStages> turn(loaded + j);
          empty[turn.stage].wait(turn.parity ^ 1);
          full[turn.stage].arrive_expect(tiles[0].kBytes);
          tiles[turn.stage].load(map, full[turn.stage], (work.key_tiles - 1 - j) * kKeys,
                                 work.head / args.group, work.batch, Keep::kLong);
        };
        auto load_k = [&](int j) { load(smem.k, smem.k_full, smem.k_empty, gmem_k, j); };
        auto load_v = [&](int j) { load(smem.v, smem.v_full, smem.v_empty, gmem_v, j); };

        load_k(0);
        smem.q_empty.wait(visit % 2 ^ 1);
        smem.q_full.arrive_expect(smem.q.kBytes);
        smem.q.load(gmem_q, smem.q_full, work.row, work.head, work.batch, Keep::kShortly);
        for (int j = 1; j < work.key_tiles; ++j) {
          load_k(j);
          load_v(j - 1);
        }
        load_v(work.key_tiles - 1);
        loaded += work.key_tiles;
      }
    }
    return;
  }

  raise_registers<Shape::kComputeRegisters>();
  const int own = warpgroup - 1, thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const int own_row = own * 64 + warp * 16;  // first of this warp's rows in the tile
  // a thread holds pairs of columns of the rows lane / 4 and lane / 4 + 8 of its warp: element i is
  // in row i / 2 % 2 of the two and in column 8 * (i / 4) + 2 * (lane % 4) + i % 2
  float acc_s[kKeys / 2], acc_o[kHeadDim / 2];
  uint32_t frag_p[kKeys / 16][4];
  float row_max[2], row_sum[2], shrink[2];
  int limit[2];  // keys that the row sees

  auto issue_scores = [&](uint32_t stage) {
    wgmma_fence(acc_s);
#pragma unroll
    for (int d = 0; d < kHeadDim; d += 16)
      wgmma<kType, Major::kK>(acc_s, smem.q.k_major(own * 64, d), smem.k[stage].k_major(0, d),
                              d > 0);
    wgmma_commit();
  };
  auto issue_values = [&](uint32_t stage) {
    wgmma_fence(acc_o);
#pragma unroll
    for (int k = 0; k < kKeys; k += 16)
      wgmma<kType, Major::kMN>(acc_o, frag_p[k / 16], smem.v[stage].mn_major(k), true);
    wgmma_commit();
  };
  auto release = [&](Barrier& empty) {
    if (lane == 0) empty.arrive();
  };
  // acc_s becomes exp(S - row_max); what was summed before has to shrink
  auto softmax = [&](int key, bool masked) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (masked) {
        const int beyond = limit[r] - key - lane % 4 * 2;
#pragma unroll
        for (int i = 2 * r; i < kKeys / 2; i += 4) {
          if (i / 4 * 8 >= beyond) acc_s[i] = -INFINITY;
          if (i / 4 * 8 + 1 >= beyond) acc_s[i + 1] = -INFINITY;
        }
      }
      float highest = row_max[r];
#pragma unroll
      for (int i = 2 * r; i < kKeys / 2; i += 4)
        highest = fmaxf(highest, fmaxf(acc_s[i], acc_s[i + 1]));
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
      // no key so far: (-inf) - (-inf) would poison the row
      const float base_log2 = highest == -INFINITY ? 0 : highest * args.scale_log2;
      shrink[r] = exp2_approx(row_max[r] * args.scale_log2 - base_log2);
      float sum = 0;
#pragma unroll
      for (int i = 2 * r; i < kKeys / 2; i += 4) {
        acc_s[i] = exp2_approx(fmaf(acc_s[i], args.scale_log2, -base_log2));
        acc_s[i + 1] = exp2_approx(fmaf(acc_s[i + 1], args.scale_log2, -base_log2));
        sum += acc_s[i] + acc_s[i + 1];
      }
      row_sum[r] = fmaf(row_sum[r], shrink[r], sum);
      row_max[r] = highest;
    }
  };
  // accumulators of 16 keys, packed in order, are an operand A
  auto pack_weights = [&] {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i)
      frag_p[i / 4][i % 4] = pack<kType>(acc_s[2 * i], acc_s[2 * i + 1]);
  };
  // named barrier 1 + w stands for the turn of computing warpgroup w; at d = 256 the products are
  // long enough to overlap by themselves
  constexpr bool kTurns = kHeadDim <= 128;
  auto await_turn = [&] {
    if (kTurns) named_barrier_sync(1 + own, 256);
  };
  auto pass_turn = [&] {
    if (kTurns) named_barrier_arrive(1 + (own + 1) % kWarpgroups, 256);
  };

  if (kTurns && own == 0) named_barrier_arrive(1, 256);
  uint32_t visit = 0, used = 0;  // tiles of q, and of k and v
  for (int index = blockIdx.x; index < args.tiles; index += gridDim.x, ++visit) {
    const Work work = work_at(index);
    const int row = work.row + own_row + lane / 4;
    auto key_of = [&](int j) { return (work.key_tiles - 1 - j) * kKeys; };
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      limit[r] = kCausal ? min(args.sk, row + 8 * r + diagonal + 1) : args.sk;
      row_max[r] = -INFINITY;
      row_sum[r] = 0;
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) acc_o[i] = 0;

    auto first_scores = [&] {
      const Turn<kStages> k(used);
      smem.k_full[k.stage].wait(k.parity);
      issue_scores(k.stage);
      wgmma_wait<0>(acc_s);
      release(smem.k_empty[k.stage]);
      softmax(key_of(0), true);
      pack_weights();
    };
    auto step = [&](int j, bool masked) {
      const Turn<kStages> k(used + j), v(used + j - 1);
      smem.k_full[k.stage].wait(k.parity);
      await_turn();
      issue_scores(k.stage);
      smem.v_full[v.stage].wait(v.parity);
      issue_values(v.stage);
      pass_turn();
      wgmma_wait<1>(acc_s);
      release(smem.k_empty[k.stage]);
      softmax(key_of(j), masked);
      wgmma_wait<0>(acc_o);
      release(smem.v_empty[v.stage]);
      pack_weights();
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) acc_o[i] *= shrink[i / 2 % 2];
    };
    auto last_values = [&] {
      const Turn<kStages> v(used + work.key_tiles - 1);
      smem.v_full[v.stage].wait(v.parity);
      issue_values(v.stage);
      wgmma_wait<0>(acc_o);
      release(smem.v_empty[v.stage]);
    };
    auto finish = [&] {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float sum = row_sum[r];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (lane % 4 == 0 && row + 8 * r < args.sq) {
          const int64_t rows = (static_cast<int64_t>(work.batch) * args.hq + work.head) * args.sq;
          constexpr float kLn2 = 0.693147181f;
          args.lse[rows + row + 8 * r] =
              sum == 0 ? -INFINITY : (row_max[r] * args.scale_log2 + log2f(sum)) * kLn2;
        }
        // a row without keys gives zero, whatever its masked values were
        const float inverse = 1 / sum;
#pragma unroll
        for (int i = 2 * r; i < kHeadDim / 2; i += 4) {
          acc_o[i] = sum == 0 ? 0 : acc_o[i] * inverse;
          acc_o[i + 1] = sum == 0 ? 0 : acc_o[i + 1] * inverse;
        }
      }
    };
    // a warp's rows of q were read by its own products alone, so out may replace them
    auto store = [&] {
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; i += 8)
        stmatrix_x4(smem.q.address(own_row + lane % 16, i * 2 + lane / 16 * 8),
                    pack<kType>(acc_o[i], acc_o[i + 1]), pack<kType>(acc_o[i + 2], acc_o[i + 3]),
                    pack<kType>(acc_o[i + 4], acc_o[i + 5]),
                    pack<kType>(acc_o[i + 6], acc_o[i + 7]));
      // every writer fences, then the barrier, then one thread copies
      fence_async_smem();
      named_barrier_sync(8 + own, 128);
      if (thread == 0) {
        smem.q.store(gmem_out, own * 64, work.row + own * 64, work.head, work.batch);
        commit_copies();
        wait_copies_read<0>();
        smem.q_empty.arrive();
      }
    };

    smem.q_full.wait(visit % 2);
    first_scores();
    int j = 1;
    if (kCausal) {
      const int full_tiles = max(0, (work.row + diagonal + 1) / kKeys);  // below the diagonal
#pragma unroll 1
      for (; j < work.key_tiles - full_tiles; ++j) step(j, true);
    }
#pragma unroll 1
    for (; j < work.key_tiles; ++j) step(j, false);
    last_values();
    used += work.key_tiles;
    finish();
    store();
  }
}

template <DType kType, int kHeadDim, bool kCausal>
void launch_forward(const ForwardCall& call, cudaStream_t stream) {
  using Shape = Forward<kHeadDim, kCausal>;
  const auto map = [&](const void* data, int64_t s, int64_t h, const Strides& strides, int rows) {
    return make_tensor_map(
        kType, data, {kHeadDim, s, h, call.b, strides.row, strides.head, strides.batch}, rows);
  };
  const int head_tiles = static_cast<int>((call.sq + Shape::kQueries - 1) / Shape::kQueries);
  const int tiles = static_cast<int>(head_tiles * call.hq * call.b);
  const ForwardArgs args{static_cast<int>(call.sq),
                         static_cast<int>(call.sk),
                         static_cast<int>(call.hq),
                         static_cast<int>(call.hq / call.hk),
                         head_tiles,
                         tiles,
                         call.scale * 1.44269504f,
                         call.lse};
  launch<forward_sm90_kernel<kType, kHeadDim, kCausal>>(
      {std::min(tiles, call.processors), Shape::kThreads,
       sm90::shared_memory_bytes<typename Shape::Smem>(), stream},
      map(call.q, call.sq, call.hq, call.q_strides, Shape::kQueries),
      map(call.k, call.sk, call.hk, call.k_strides, Shape::kKeys),
      map(call.v, call.sk, call.hk, call.v_strides, Shape::kKeys),
      map(call.out, call.sq, call.hq, call.out_strides, 64), args);
}

}  // namespace

template <DType kType, int kHeadDim>
void launch_forward_sm90(const ForwardCall& call, cudaStream_t stream) {
  call.causal ? launch_forward<kType, kHeadDim, true>(call, stream)
              : launch_forward<kType, kHeadDim, false>(call, stream);
}

}  // namespace heddle
