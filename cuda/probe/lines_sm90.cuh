#pragma once
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/sm80.cuh"
#include "common/sm90.cuh"
#include "common/tensor_map.h"
#include "common/tile.cuh"
#include "probe/lines_sm90.h"
#include "probe/means.cuh"

// Masses of keys and of distances for up to 128 last queries:
//
//   P[i,t] = softmax(scale * q[i] . k)[t]     where t <= p(i)
//   score[0,t] = mean(i) P[i,t]               score[1,e] = mean(i) P[i,p(i)-e]
//
// Two kernels walk over the keys; one leaves the largest score and the sum of each query, one the
// masses. Warpgroup 0 loads, two others have a head each and the same keys, or, in groups of an odd
// number of heads, keys of their own: four strips, of which 32 keys each make a stage of two
// products. One is multiplied under the work on the other.
//
// In the first walk queries are the rows of a product, 64 of them, so that they come from registers
// and a thread has few. In the other keys are: a warp then has all queries of a key, and adds up
// the masses of a strip of its own. A thread's scores lie on few diagonals of 8 x 8 squares. It
// adds them up in registers, which move on with the keys: a stage ends four diagonals of squares,
// whose 32 distances are then added up from shared memory. No sum depends on timing.
//
// The three warps beside the one that loads average some blocks of q and k, half of them in each
// walk: memory has nothing else to do.
namespace heddle {
namespace {

constexpr int kLineQueries = 128, kLineKeys = 32, kLineStages = 3, kLineThreads = 384;
// Warps that average blocks, rows that come together, and how often they are on their way
constexpr int kMeanWarps = 3, kMeanRows = kMeanBox, kMeanStages = 4;
// Diagonals of a stage's squares: 16 of queries, 4 of keys
constexpr int kLineSquares = kLineKeys / 8, kDiagonals = kLineQueries / 8 + kLineSquares - 1;

struct LinesArgs {
  Probe op;
  LinesPlan plan;
  float2* stats;
  LineStrips strips;
  MeanArgs mean_q, mean_k;
  int blocks;
  float scale_log2;
};

template <int kD> struct MeanRing {
  sm90::Tile<kMeanRows, kD> rows[kMeanStages];
  sm90::Barrier full[kMeanStages];
};

template <int kD> struct LinesSmem {
  sm90::Tile<kLineQueries, kD> q[2];
  sm90::Tile<4 * kLineKeys, kD> k[kLineStages];
  float lse[2][kLineQueries];
  float diagonals[8][8][kLineKeys + 8];  // per warp; rows of squares, and the square before
  MeanRing<kD> means[kMeanWarps];
  sm90::Barrier q_full, k_full[kLineStages], k_empty[kLineStages];
};

// Which number of a thread's 32 queries, and which of its two keys, a register is of
constexpr int line_query(int i) { return i / 4 * 2 + i % 2; }
constexpr int line_key(int i) { return i / 2 % 2; }

// Of several parts of a row
template <class At> __device__ __forceinline__ float2 merge_stats(int count, const At& at) {
  float top = -3e38f, sum = 0;
  for (int i = 0; i < count; ++i) top = fmaxf(top, at(i).x);
  for (int i = 0; i < count; ++i) {
    const float2 own = at(i);
    sum += own.y * sm90::exp2_approx(own.x - top);
  }
  return {top, sum};
}

// The largest scores of a thread's four queries, two of each product, and sums relative to 2^top.
// The largest may be ahead of `top` by kLag: sums of 2^64 lose no digits.
struct LineStats {
  static constexpr float kLag = 64;
  float top[2][2] = {}, sum[2][2] = {};

  template <int kStep> __device__ __forceinline__ float base(int i) const {
    return top[kStep][i / 2 % 2];
  }

  template <int kStep> __device__ __forceinline__ void add(float (&x)[64], bool first) {
    float highest[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < 64; ++i) highest[i / 2 % 2] = fmaxf(highest[i / 2 % 2], x[i]);
    if (first || __any_sync(~0u, fmaxf(highest[0], highest[1]) > kLag)) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float rise = fmaxf(highest[n], first ? -3e38f : 0);
        sum[kStep][n] = first ? 0 : sum[kStep][n] * sm90::exp2_approx(-rise);
        top[kStep][n] += rise;
#pragma unroll
        for (int i = 2 * n; i < 64; i += i % 2 ? 3 : 1) x[i] -= rise;
      }
    }
    // several sums: one would have to wait for each before the next
    float sums[2][2] = {};
#pragma unroll
    for (int i = 0; i < 64; ++i) sums[i / 2 % 2][i % 2] += sm90::exp2_approx(x[i]);
#pragma unroll
    for (int n = 0; n < 2; ++n) sum[kStep][n] += sums[n][0] + sums[n][1];
  }
};

// Sums over queries of a thread's four keys of a stage, and over what it has of each diagonal
struct LineSums {
  float lse[32], column[4] = {}, diagonal[kDiagonals][2] = {}, before[2] = {};

  template <int kStep> __device__ __forceinline__ float base(int i) const {
    return lse[line_query(i)];
  }

  // Product kStep has the keys of squares kStep and kStep + 2
  template <int kStep> __device__ __forceinline__ void add(float (&x)[64], bool) {
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      const int square = kStep + 2 * line_key(i);
      const float p = sm90::exp2_approx(x[i]);
      column[square] += p;
      diagonal[i / 4 - square + kLineSquares - 1][i % 2] += p;
    }
  }

  // The mass of key 8 * (lane % 4) + lane / 4 of a stage
  __device__ __forceinline__ float mass(int lane) {
    const bool odd = lane & 1, high = lane & 2;
    float pair[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float own = odd ? column[2 * i + 1] : column[2 * i];
      const float other = odd ? column[2 * i] : column[2 * i + 1];
      pair[i] = own + __shfl_xor_sync(~0u, other, 1);
      column[2 * i] = column[2 * i + 1] = 0;
    }
    return (high ? pair[1] : pair[0]) + __shfl_xor_sync(~0u, high ? pair[0] : pair[1], 2);
  }

  // The mass on diagonal 8 * D + lane, D the first of the four diagonals of squares that are over.
  // It lies in these four, below their own diagonals, and above that of the one before.
  __device__ __forceinline__ float finish(float (&squares)[8][kLineKeys + 8], int lane) {
    const int row = lane / 4, column = lane % 4 * 2;
    __syncwarp();  // what the last call wrote has been read
#pragma unroll
    for (int i = 0; i <= kLineSquares; ++i) {
      const float* from = i == kLineSquares ? before : diagonal[kDiagonals - kLineSquares + i];
      *reinterpret_cast<float2*>(&squares[row][8 * i + column]) = {from[0], from[1]};
    }
    __syncwarp();
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += squares[i][lane + i];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      before[j] = diagonal[kDiagonals - kLineSquares][j];
#pragma unroll
      for (int i = kDiagonals - 1; i >= 0; --i)
        diagonal[i][j] = i < kLineSquares ? 0 : diagonal[i - kLineSquares][j];
    }
    return sum;
  }
};

// Means of the blocks from `first` to `end`, those of k behind those of q and of the same size,
// every `step`-th, by one warp. A lane has 16 bytes of rows that are kRows apart.
template <DType kType, int kD>
__device__ __forceinline__ void average_blocks(const sm90::TensorMap& gmem_q,
                                               const sm90::TensorMap& gmem_k, const MeanArgs& q,
                                               const MeanArgs& k, MeanRing<kD>& ring, int first,
                                               int end, int step) {
  constexpr int kLanes = kD / 8, kRows = 32 / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % 32, row = lane / kLanes,
            column = lane % kLanes * 8;
  const int of_q = static_cast<int>(q.count()), boxes = static_cast<int>(q.block) / kMeanRows;
  const auto find = [&](int block) {
    return (block < of_q ? q : k).at(static_cast<uint32_t>(block < of_q ? block : block - of_q));
  };
  // What is asked for next
  int block = first, box = 0;
  const auto request = [&](uint32_t stage) {
    if (block >= end) return;
    if (sm90::elect_one()) {
      const MeanArgs::Block found = find(block);
      ring.full[stage].arrive_expect(ring.rows[stage].kBytes);
      ring.rows[stage].load(block < of_q ? gmem_q : gmem_k, ring.full[stage],
                            static_cast<int>(found.first) + box * kMeanRows, found.head, found.b,
                            sm90::Keep::kShortly);
    }
    if (++box == boxes) {
      box = 0;
      block += step;
    }
  };
#pragma unroll 1
  for (uint32_t stage = 0; stage < kMeanStages; ++stage) request(stage);
  sm90::Turn<kMeanStages> turn(0);
#pragma unroll 1
  for (int own = first; own < end; own += step) {
    float sum[8] = {};
#pragma unroll 1
    for (int n = 0; n < boxes; ++n) {
      ring.full[turn.stage].wait(turn.parity);
#pragma unroll 4
      for (int i = row; i < row + kMeanRows; i += kRows) {
        uint32_t words[4];
        sm90::load_16_bytes(ring.rows[turn.stage].address(i, column), words);
#pragma unroll
        for (int e = 0; e < 8; ++e)
          sum[e] += sm90::unpack<kType>(static_cast<uint16_t>(words[e / 2] >> 16 * (e % 2)));
      }
      __syncwarp();
      request(turn.stage);
      turn.advance();
    }
    const MeanArgs::Block found = find(own);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      for (int other = kLanes; other < 32; other *= 2)
        sum[i] += __shfl_xor_sync(~0u, sum[i], other);
      if (row == 0)
        store_mean(own < of_q ? q : k, found.to + column + i,
                   sum[i] / static_cast<float>(found.rows));
    }
  }
}

template <DType kType, int kD, bool kSums>
__global__ void __launch_bounds__(kLineThreads, 1)
    probe_lines_sm90_kernel(const __grid_constant__ sm90::TensorMap gmem_q,
                            const __grid_constant__ sm90::TensorMap gmem_k,
                            const __grid_constant__ sm90::TensorMap gmem_mean_q,
                            const __grid_constant__ sm90::TensorMap gmem_mean_k,
                            const __grid_constant__ LinesArgs args) {
  using namespace sm90;
  auto& smem = shared_memory<LinesSmem<kD>>();
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  const LinesPlan& plan = args.plan;
  const int heads = static_cast<int>(args.op.q.shape[2]);
  const int group = heads / static_cast<int>(args.op.k.shape[2]);
  const int sq = static_cast<int>(args.op.q.shape[1]), sk = static_cast<int>(args.op.k.shape[1]);
  const int item = blockIdx.x % plan.items, cta = blockIdx.x / plan.items;
  const int turns = plan.strip / kLineKeys, each = plan.shared ? 1 : 2;
  // over the batch, and where the four strips of a warpgroup begin
  const auto head_of = [&](int own) { return plan.shared ? 2 * item + own : item; };
  const auto part_of = [&](int own) { return plan.shared ? cta : 2 * cta + own; };

  if (threadIdx.x == 0) {
    smem.q_full.init(1);
    for (int stage = 0; stage < kLineStages; ++stage) {
      smem.k_full[stage].init(1);
      smem.k_empty[stage].init(8);
    }
    for (MeanRing<kD>& ring : smem.means)
      for (Barrier& full : ring.full) full.init(1);
    fence_barrier_init();
  }
  __syncthreads();
  // What the second walk loads was there before the first began
  if (!kSums) await_previous();
  let_next_begin();

  if (warpgroup == 0) {
    lower_registers<40>();
    if (threadIdx.x >= 32) {
      const int warp = static_cast<int>(threadIdx.x) / 32 - 1;
      const int count = args.blocks;
      average_blocks<kType, kD>(
          gmem_mean_q, gmem_mean_k, args.mean_q, args.mean_k, smem.means[warp],
          (kSums ? count / 2 : 0) + static_cast<int>(blockIdx.x) * kMeanWarps + warp,
          kSums ? count : count / 2, static_cast<int>(gridDim.x) * kMeanWarps);
    } else if (elect_one()) {
      prefetch(gmem_q);
      prefetch(gmem_k);
      smem.q_full.arrive_expect(2 * smem.q[0].kBytes);
      for (int own = 0; own < 2; ++own)
        smem.q[own].load(gmem_q, smem.q_full, 0, head_of(own) % heads, head_of(own) / heads,
                         Keep::kLong);
      const int kv_head = head_of(0) % heads / group, batch = head_of(0) / heads;
      for (int n = 0; n < turns * each; ++n) {
        const Turn<kLineStages> turn(n);
        const int first = part_of(n % each) * 4 * plan.strip + n / each * kLineKeys;
        smem.k_empty[turn.stage].wait(turn.parity ^ 1);
        smem.k_full[turn.stage].arrive_expect(smem.k[0].kBytes);
        for (int warp = 0; warp < 4; ++warp)
          smem.k[turn.stage].load(gmem_k, smem.k_full[turn.stage], first + warp * plan.strip,
                                  kv_head, batch, Keep::kNormal, warp * kLineKeys);
      }
    }
    return;
  }

  raise_registers<232>();
  const int own = warpgroup - 1, thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const int row = lane / 4, column = lane % 4 * 2;
  const int64_t head = head_of(own), parts = plan.parts;
  // A warp's own strip, or the last of the four where it has queries of its own instead
  const int first = (part_of(own) * 4 + (kSums ? warp : 3)) * plan.strip, ahead = sk - sq;
  const auto turn_of = [&](int n) {
    return Turn<kLineStages>(static_cast<uint32_t>(plan.shared ? n : 2 * n + own));
  };
  float2* stats = args.stats + head * parts * kLineQueries;
  std::conditional_t<kSums, LineSums, LineStats> sums;
  if constexpr (kSums) {
    await_previous();
    const float2 all = merge_stats(static_cast<int>(parts),
                                   [&](int i) { return stats[i * kLineQueries + thread]; });
    smem.lse[own][thread] = all.x + log2f(all.y);
    named_barrier_sync(1 + own, 128);
#pragma unroll
    for (int i = 0; i < 32; ++i) sums.lse[i] = smem.lse[own][i / 2 * 8 + column + i % 2];
  }

  // Queries of the first walk stay in registers, so that shared memory gives keys alone
  [[maybe_unused]] uint32_t frag_q[2][kD / 16][4];
  float acc[2][64];
  const auto issue = [&](int n, int step) {
    const uint32_t stage = turn_of(n).stage;
    wgmma_fence(acc[step]);
#pragma unroll
    for (int d = 0; d < kD; d += 16)
      if constexpr (kSums) {
        // every second square of a warp's four
        wgmma<kType, Major::kK>(acc[step], smem.k[stage].k_major(8 * step, d, 2048),
                                smem.q[own].k_major(0, d), d > 0);
      } else {
        wgmma<kType, Major::kK>(acc[step], frag_q[step][d / 16], smem.k[stage].k_major(0, d),
                                d > 0);
      }
    wgmma_commit();
  };
  const auto work = [&]<int kStep>(std::integral_constant<int, kStep>, int n) {
    float(&x)[64] = acc[kStep];
    const int key = first + n * kLineKeys;
#pragma unroll
    for (int i = 0; i < 64; ++i) x[i] = fmaf(x[i], args.scale_log2, -sums.template base<kStep>(i));
    if (sq < kLineQueries || key + kLineKeys > ahead + 1) {
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        const int query =
            kSums ? i / 4 * 8 + column + i % 2 : kStep * 64 + warp * 16 + i / 2 % 2 * 8 + row;
        const int own_key = kSums
                                ? key + 8 * (kStep + 2 * line_key(i)) + row
                                : key - (3 - i / 16) * plan.strip + i / 4 % 4 * 8 + column + i % 2;
        if (query >= sq || own_key > ahead + query) x[i] = -INFINITY;
      }
    }
    sums.template add<kStep>(x, n == 0);
  };
  const auto await_turn = [&](const Turn<kLineStages>& turn) {
    smem.k_full[turn.stage].wait(turn.parity);
  };
  const auto release = [&](const Turn<kLineStages>& turn) {
    if (lane == 0) smem.k_empty[turn.stage].arrive();
  };
  const auto await_keys = [&](int n) {
    // Stages of the other warpgroup pass by: whoever missed one would take the next for it
    if (!plan.shared && n + own > 0) {
      const Turn<kLineStages> before(static_cast<uint32_t>(2 * n + own - 1));
      await_turn(before);
      release(before);
    }
    await_turn(turn_of(n));
  };

  [[maybe_unused]] const float share = 1.f / static_cast<float>(sq);
  [[maybe_unused]] float* score = static_cast<float*>(args.op.score.data) + head * 2 * sk;
  [[maybe_unused]] float* distances = args.strips.of(head, part_of(own) * 4 + warp) + lane;
  const auto finish_distances = [&](int n) {
    if constexpr (kSums)
      distances[plan.strip + kLineQueries - (n + 1) * kLineKeys] =
          sums.finish(smem.diagonals[own * 4 + warp], lane);
  };

  using First = std::integral_constant<int, 0>;
  using Second = std::integral_constant<int, 1>;
  const auto finish = [&](int n) {
    if constexpr (kSums) {
      const int key = first + n * kLineKeys + lane % 4 * 8 + row;
      const float mass = sums.mass(lane);
      if (key < sk) score[key] = mass * share;
    }
    finish_distances(n);
  };

  smem.q_full.wait(0);
  if constexpr (!kSums)
#pragma unroll
    for (int i = 0; i < 2 * kD / 16; ++i)
      load_matrices<false>(smem.q[own].address(i / (kD / 16) * 64 + warp * 16 + lane % 16,
                                               i % (kD / 16) * 16 + lane / 16 * 8),
                           frag_q[i / (kD / 16)][i % (kD / 16)]);
  await_keys(0);
  issue(0, 0);
  // A product is waited for behind a branch, or the compiler lets the work wait as well
#pragma unroll 1
  for (int n = 0; n < turns - 1; ++n) {
    wgmma_wait<0>(acc[0]);
    issue(n, 1);
    work(First{}, n);
    await_keys(n + 1);
    wgmma_wait<0>(acc[1]);
    release(turn_of(n));
    issue(n + 1, 0);
    work(Second{}, n);
    finish(n);
  }
  wgmma_wait<0>(acc[0]);
  issue(turns - 1, 1);
  work(First{}, turns - 1);
  wgmma_wait<0>(acc[1]);
  work(Second{}, turns - 1);
  finish(turns - 1);

  if constexpr (kSums) {
#pragma unroll 1
    for (int n = turns; n < turns + kLineQueries / kLineKeys; ++n) finish_distances(n);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float own_top = sums.top[i / 2][i % 2];
      float top = own_top;
      for (int step = 1; step < 4; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
      float sum = sums.sum[i / 2][i % 2] * sm90::exp2_approx(own_top - top);
      for (int step = 1; step < 4; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
      if (column == 0)
        stats[part_of(own) * kLineQueries + i / 2 * 64 + warp * 16 + i % 2 * 8 + row] = {top, sum};
    }
  }
}

template <DType kType, int kD, bool kSums>
void launch_lines(const LinesCall& call, cudaStream_t stream) {
  const Probe& op = call.op;
  const auto map = [](const Tensor& x, int rows) {
    return make_tensor_map(
        kType, x.data,
        {x.shape[3], x.shape[1], x.shape[2], x.shape[0], x.strides[1], x.strides[2], x.strides[0]},
        rows);
  };
  // Maps of nothing are not looked at
  const Tensor &mean_q = call.blocks > 0 ? call.mean_q.x : op.q,
               &mean_k = call.blocks > 0 ? call.mean_k.x : op.k;
  launch<probe_lines_sm90_kernel<kType, kD, kSums>>(
      {call.plan.items * call.plan.ctas, kLineThreads, sm90::shared_memory_bytes<LinesSmem<kD>>(),
       stream, true},
      map(op.q, kLineQueries), map(op.k, kLineKeys), map(mean_q, kMeanRows), map(mean_k, kMeanRows),
      LinesArgs{op, call.plan, call.stats, call.strips, call.mean_q, call.mean_k, call.blocks,
                static_cast<float>(op.scale * 1.4426950408889634)});
}

}  // namespace

template <DType kType, int kD> void launch_lines_sm90(const LinesCall& call, cudaStream_t stream) {
  launch_lines<kType, kD, false>(call, stream);
  launch_lines<kType, kD, true>(call, stream);
}

}  // namespace heddle
