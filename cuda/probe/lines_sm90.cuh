#pragma once
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/lanes.cuh"
#include "common/sm80.cuh"
#include "common/sm90.cuh"
#include "common/tensor_map.h"
#include "common/tile.cuh"
#include "probe/lines_sm90.h"
#include "probe/means.cuh"
#include "probe/stats_sm90.cuh"

// Masses of keys and of distances for up to 128 last queries:
//
//   P[i,t] = softmax(scale * q[i] . k)[t]     where t <= p(i)
//   score[0,t] = mean(i) P[i,t]               score[1,e] = mean(i) P[i,p(i)-e]
//
// Two kernels walk over the keys; one leaves the largest score and the sum of each query, one the
// masses. Warpgroup 0 loads. Of four others two have a head and two another, with the same keys,
// or, in groups of an odd number of heads, all have one head and twice the keys. Those of a head
// halve its queries in the first walk and its keys in the other. Each has one product, and while it
// waits for that the others have exponentials.
//
// In the first walk queries are the rows of a product, 64 of them: a thread has few. In the other
// keys are, 16 of each of four strips: a warp has all queries of a key, and adds up the masses of a
// strip of its own. A thread's scores lie on few diagonals of 8 x 8 squares. It adds them up in
// registers, which move on with the keys: a turn ends two diagonals of squares, whose 16 distances
// are then added up from shared memory. No sum depends on timing.
//
// The first CTAs of the first walk have no part in that: they average blocks, for which they need
// the memory that the walk leaves alone. CTAs that the second walk leaves out do so as well.
namespace heddle {
namespace {

constexpr int kLineQueries = 128, kLineKeys = 16, kLineThreads = 640;
// Diagonals of a turn's squares: 16 of queries, 2 of keys
constexpr int kLineSquares = kLineKeys / 8, kDiagonals = kLineQueries / 8 + kLineSquares - 1;

struct LinesArgs {
  LinesCall call;
  float scale_log2;
};

template <int kD, bool kSums> struct LinesSmem {
  static constexpr int kRows = kSums ? 4 * kLineKeys : 8 * kLineKeys, kStages = 384 / kRows;
  sm90::Tile<kLineQueries, kD> q[2];
  sm90::Tile<kRows, kD> k[kStages];
  float lse[4][kLineQueries];
  float diagonals[16][8][kLineKeys + 8];  // per warp; rows of squares, and the square before
  sm90::Barrier q_full, k_full[kStages], k_empty[kStages];
};

// The largest scores of a thread's two queries, and sums relative to 2^top. The largest may be
// ahead of `top` by kLag: sums of 2^64 lose no digits. Lanes of a query agree on `top`.
struct LineStats {
  static constexpr float kLag = 64;
  float top[2] = {}, sum[2] = {};

  // `sums` are those of a tile alone: [query][of keys up to the one with its number, of others].
  // The queries are the part-th 16 of 128.
  __device__ __forceinline__ void add(float (&x)[64], bool first, int part, int lane,
                                      float (&sums)[2][2]) {
    float highest[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < 64; ++i) highest[i / 2 % 2] = fmaxf(highest[i / 2 % 2], x[i]);
    if (first || __any_sync(~0u, fmaxf(highest[0], highest[1]) > kLag)) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        highest[n] = quad_max(highest[n]);
        const float rise = fmaxf(highest[n], first ? -3e38f : 0);
        sum[n] = first ? 0 : sum[n] * sm90::exp2_approx(-rise);
        top[n] += rise;
#pragma unroll
        for (int i = 2 * n; i < 64; i += i % 2 ? 3 : 1) x[i] -= rise;
      }
    }
    weigh<0, 8>(x, part, lane, sums);
#pragma unroll
    for (int n = 0; n < 2; ++n) sum[n] += sums[n][0] + sums[n][1];
  }

 private:
  // Registers have to be known: a copy of this for each part
  template <int kFrom, int kEnd>
  __device__ __forceinline__ static void weigh(const float (&x)[64], int part, int lane,
                                               float (&sums)[2][2]) {
    if constexpr (kEnd - kFrom > 1) {
      constexpr int kMiddle = (kFrom + kEnd) / 2;
      if (part < kMiddle)
        weigh<kFrom, kMiddle>(x, part, lane, sums);
      else
        weigh<kMiddle, kEnd>(x, part, lane, sums);
    } else {
      // several sums: one would have to wait for each before the next
      float own[2][2][2] = {};
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        const int n = i / 2 % 2, square = i / 4, diagonal = 2 * kFrom + n;
        const float weight = sm90::exp2_approx(x[i]);
        if (square != diagonal) {
          own[n][square > diagonal][i % 2] += weight;
        } else {
          const bool behind = lane % 4 * 2 + i % 2 > lane / 4;
          own[n][0][i % 2] += behind ? 0 : weight;
          own[n][1][i % 2] += behind ? weight : 0;
        }
      }
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int side = 0; side < 2; ++side) sums[n][side] = own[n][side][0] + own[n][side][1];
    }
  }
};

// Sums over queries of a thread's two keys of a turn, and over what it has of each diagonal
struct LineSums {
  float column[2] = {}, diagonal[kDiagonals][2] = {}, before[2] = {};

  __device__ __forceinline__ void add(const float (&x)[64]) {
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      const int square = i / 2 % 2;
      const float p = sm90::exp2_approx(x[i]);
      column[square] += p;
      diagonal[i / 4 - square + kLineSquares - 1][i % 2] += p;
    }
  }

  // The mass of key 8 * (lane % 2) + lane / 4 of a turn
  __device__ __forceinline__ float mass(int lane) {
    const bool odd = lane & 1;
    float own = odd ? column[1] : column[0];
    own += __shfl_xor_sync(~0u, odd ? column[0] : column[1], 1);
    column[0] = column[1] = 0;
    return own + __shfl_xor_sync(~0u, own, 2);
  }

  // The mass on diagonal 8 * D + lane % 16, D the first of the two diagonals of squares that are
  // over. It lies in these, below their own diagonals, and above that of the one before.
  __device__ __forceinline__ float finish(float (&squares)[8][kLineKeys + 8], int lane) {
    const int row = lane / 4, column = lane % 4 * 2;
    __syncwarp();  // what the last call wrote has been read
#pragma unroll
    for (int i = 0; i <= kLineSquares; ++i) {
      const float* from = i == kLineSquares ? before : diagonal[kDiagonals - kLineSquares + i];
      *reinterpret_cast<float2*>(&squares[row][8 * i + column]) = {from[0], from[1]};
    }
    __syncwarp();
    // Half of the rows each
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += squares[lane / 16 * 4 + i][lane % 16 + lane / 16 * 4 + i];
    sum += __shfl_xor_sync(~0u, sum, 16);
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

// The mean of block `number` by one warp, of which a lane has 16 bytes of a row. Several rows of
// the block stand beside each other, or the same one of several heads, whose numbers follow.
template <DType kType, int kD> struct Averages {
  static constexpr int kLanes = kD / 8, kRows = 32 / kLanes, kAhead = 16;
  const MeanArgs& args;
  bool beside;  // heads
  int count;    // of blocks, or of groups of them

  __device__ __forceinline__ Averages(const MeanArgs& args, int warps)
      : args(args), count(static_cast<int>(args.count())) {
    // Longer runs of memory, where warps have several of them
    beside = args.x.shape[2] % kRows == 0 && args.x.strides[2] == kD && count >= 2 * kRows * warps;
    if (beside) count /= kRows;
  }
  __device__ __forceinline__ int group() const { return beside ? kRows : 1; }

  __device__ __forceinline__ void average(int number) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, row = lane / kLanes,
              column = lane % kLanes * 8;
    const MeanArgs::Block found = args.at(static_cast<uint32_t>(number * group()));
    const int64_t(&strides)[kMaxRank] = args.x.strides;
    const auto* from = static_cast<const uint16_t*>(args.x.data) + found.b * strides[0] +
                       found.head * strides[2] + found.first * strides[1] +
                       row * strides[beside ? 2 : 1] + column;
    const int step = beside ? 1 : kRows, rows = static_cast<int>(found.rows);
    const int64_t apart = step * strides[1];
    float sum[8] = {};
#pragma unroll 1
    for (int i = beside ? 0 : row; i < rows; i += kAhead * step, from += kAhead * apart) {
      uint4 words[kAhead];  // on their way at once
#pragma unroll
      for (int a = 0; a < kAhead; ++a)
        words[a] = i + a * step < rows ? *reinterpret_cast<const uint4*>(from + a * apart)
                                       : uint4{0, 0, 0, 0};
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const uint32_t all[4] = {words[a].x, words[a].y, words[a].z, words[a].w};
#pragma unroll
        for (int e = 0; e < 8; ++e)
          sum[e] += sm90::unpack<kType>(static_cast<uint16_t>(all[e / 2] >> 16 * (e % 2)));
      }
    }
    const int64_t to = found.to + (beside ? row * args.blocks() * args.depth : 0) + column;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      for (int other = kLanes; !beside && other < 32; other *= 2)
        sum[i] += __shfl_xor_sync(~0u, sum[i], other);
      if (beside || row == 0) store_mean(args, to + i, sum[i] / static_cast<float>(rows));
    }
  }
};

// Every `step`-th block of two tensors from `first` on
template <DType kType, int kD>
__device__ __forceinline__ void average_blocks(const MeanArgs (&means)[2], int first, int step) {
#pragma unroll 1
  for (const MeanArgs& args : means) {
    const Averages<kType, kD> own(args, step);
#pragma unroll 1
    for (int i = first; i < own.count; i += step) own.average(i);
  }
}

// Blocks of heads of kind 1, as they come
template <DType kType, int kD>
__device__ __forceinline__ void average_later(const LinesCall& call) {
  const MeanArgs& args = call.later;
  const Averages<kType, kD> own(args, kLineThreads / 32 * static_cast<int>(gridDim.x));
  const auto all = static_cast<int>(args.blocks()), heads = static_cast<int>(args.x.shape[2]);
  const bool leads = threadIdx.x % 32 == 0;
  const auto take = [&] { return leads ? atomicAdd(call.next, 1) : 0; };
  int ahead = take();
#pragma unroll 1
  for (;;) {
    const int number = own.count - 1 - __shfl_sync(~0u, ahead, 0);
    if (number < 0) return;
    ahead = take();
    const int first = number * own.group(), block = first / heads % all,
              head = first / heads / all * heads + first % heads;
    bool wanted = false;
    for (int i = 0; i < own.group(); ++i) wanted |= call.kinds[head + i] == 1;
    if (!wanted) continue;
    own.average(number);
    __syncwarp();
    for (int i = 0; leads && i < own.group(); ++i)
      sm90::signal(call.ready + (head + i) * ((all + kReadyBlocks - 1) / kReadyBlocks) +
                   block / kReadyBlocks);
  }
}

template <DType kType, int kD, bool kSums>
__global__ void __launch_bounds__(kLineThreads, 1)
    probe_lines_sm90_kernel(const __grid_constant__ sm90::TensorMap gmem_q,
                            const __grid_constant__ sm90::TensorMap gmem_k,
                            const __grid_constant__ LinesArgs args) {
  using namespace sm90;
  using Smem = LinesSmem<kD, kSums>;
  constexpr int kRows = Smem::kRows, kStages = Smem::kStages;
  auto& smem = shared_memory<Smem>();
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  const LinesCall& call = args.call;
  const Probe& op = call.op;
  const LinesPlan& plan = kSums ? call.second : call.first;
  const int heads = static_cast<int>(op.q.shape[2]);
  const int group = heads / static_cast<int>(op.k.shape[2]);
  const int sq = static_cast<int>(op.q.shape[1]), sk = static_cast<int>(op.k.shape[1]);
  const int walker = static_cast<int>(blockIdx.x) - plan.averaging;

  if (threadIdx.x == 0) {
    smem.q_full.init(1);
    for (int stage = 0; stage < kStages; ++stage) {
      smem.k_full[stage].init(1);
      smem.k_empty[stage].init(16);
    }
    fence_barrier_init();
  }
  __syncthreads();
  // What the second walk loads was there before the first began, but not whom it is for
  if (!kSums || call.kinds) await_previous();
  let_next_begin();

  if (!kSums && walker < 0) {
    constexpr int kWarps = kLineThreads / 32;
    average_blocks<kType, kD>(
        call.means, static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32,
        plan.averaging * kWarps);
    return;
  }

  const int item = walker % plan.items, cta = walker / plan.items;
  // Over the batch. Warpgroups have sets of keys, which take turns in the ring.
  const auto head_of = [&](int own) { return plan.shared ? 2 * item + own / 2 : item; };
  const int turns = plan.strip / kLineKeys, sets = (kSums ? 2 : 1) * (plan.shared ? 1 : 2);
  const auto left_out = [&](int own) { return call.kinds[head_of(own)] != 0; };
  if (kSums && call.kinds && (cta >= plan.ctas || (left_out(0) && left_out(3)))) {
    if (!call.spares || cta % 2 == 0) average_later<kType, kD>(call);
    return;
  }

  if (warpgroup == 0) {
    lower_registers<24>();
    if (threadIdx.x < 32 && elect_one()) {
      prefetch(gmem_q);
      prefetch(gmem_k);
      smem.q_full.arrive_expect(2 * smem.q[0].kBytes);
      for (int i = 0; i < 2; ++i)
        smem.q[i].load(gmem_q, smem.q_full, 0, head_of(2 * i) % heads, head_of(2 * i) / heads,
                       Keep::kLong);
      const int kv_head = head_of(0) % heads / group, batch = head_of(0) / heads;
      for (int n = 0; n < turns * sets; ++n) {
        const Turn<kStages> turn(n);
        const int set = cta * sets + n % sets;
        // of the first walk one run of keys, of the other some of each of four strips
        constexpr int kRuns = kSums ? 4 : 1, kRun = kRows / kRuns;
        smem.k_empty[turn.stage].wait(turn.parity ^ 1);
        smem.k_full[turn.stage].arrive_expect(smem.k[0].kBytes);
        for (int i = 0; i < kRuns; ++i)
          smem.k[turn.stage].load(
              gmem_k, smem.k_full[turn.stage],
              (set * kRuns + i) * (kSums ? 1 : 8) * plan.strip + n / sets * kRun, kv_head, batch,
              Keep::kNormal, i * kRun);
      }
    }
    return;
  }

  raise_registers<112>();
  const int own = warpgroup - 1, thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const int row = lane / 4, column = lane % 4 * 2, ahead = sk - sq;
  const int64_t head = head_of(own);
  const int own_set = kSums ? (plan.shared ? own % 2 : own) : (plan.shared ? 0 : own / 2);
  const int set = cta * sets + own_set;
  float2* stats = call.stats + head * call.first.parts * kLineQueries;

  Turn<kStages> turn(0);
  const auto await_keys = [&] { smem.k_full[turn.stage].wait(turn.parity); };
  const auto release = [&] {
    __syncwarp();
    if (lane == 0) smem.k_empty[turn.stage].arrive();
    turn.advance();
  };
  // Keys of other sets: whoever missed them would take the next for them
  const auto pass = [&](int count) {
    for (int i = 0; i < count; ++i) {
      await_keys();
      release();
    }
  };
  float acc[64];
  constexpr int kFirstTurn = 1;  // a barrier for each warpgroup
  // Calls body(n) for the scores of each turn. Warpgroups multiply one after the other: products at
  // the same time end at the same time, and then all have exponentials.
  const auto walk = [&](const auto& body) {
    if (own == 3) named_barrier_arrive(kFirstTurn, 256);
    smem.q_full.wait(0);
    pass(own_set);
#pragma unroll 1
    for (int n = 0; n < turns; ++n) {
      if (n > 0) pass(sets - 1);
      await_keys();
      named_barrier_sync(kFirstTurn + own, 256);
      wgmma_fence(acc);
#pragma unroll
      for (int d = 0; d < kD; d += 16) {
        const uint64_t keys = smem.k[turn.stage].k_major(0, d);
        if constexpr (kSums)
          wgmma<kType, Major::kK>(acc, keys, smem.q[own / 2].k_major(0, d), d > 0);
        else
          wgmma<kType, Major::kK>(acc, smem.q[own / 2].k_major(own % 2 * 64, d), keys, d > 0);
      }
      wgmma_commit();
      wgmma_wait<0>(acc);
      named_barrier_arrive(kFirstTurn + (own + 1) % 4, 256);
      release();
      body(n);
    }
    pass(sets - 1 - own_set);
    if (own == 0) named_barrier_sync(kFirstTurn, 256);
  };

  if constexpr (kSums) {
    float(&lse)[kLineQueries] = smem.lse[own];
    await_previous();
    lse[thread] = lse_of_parts(stats + thread, call.first.parts);
    named_barrier_sync(kFirstTurn + 4 + own, 128);

    const int64_t strip = set * int64_t{4} + warp;
    const int first = static_cast<int>(strip) * plan.strip;
    const float share = 1.f / static_cast<float>(sq);
    float* score = static_cast<float*>(op.score.data) + head * 2 * sk;
    float* distances = call.strips.of(head, strip) + plan.strip + kLineQueries;
    LineSums sums;
    const auto finish_distances = [&](int n) {
      const float mass = sums.finish(smem.diagonals[own * 4 + warp], lane);
      if (lane < kLineKeys) distances[lane - (n + 1) * kLineKeys] = mass;
    };
    walk([&](int n) {
      const int key = first + n * kLineKeys;
#pragma unroll
      for (int i = 0; i < 64; i += 4) {
        const auto pair = *reinterpret_cast<const float2*>(&lse[i * 2 + column]);
#pragma unroll
        for (int j = 0; j < 4; ++j)
          acc[i + j] = fmaf(acc[i + j], args.scale_log2, -(j % 2 ? pair.y : pair.x));
      }
      if (sq < kLineQueries || key + kLineKeys > ahead + 1) {
#pragma unroll
        for (int i = 0; i < 64; ++i) {
          const int query = i / 4 * 8 + column + i % 2;
          if (query >= sq || key + i / 2 % 2 * 8 + row > ahead + query) acc[i] = -INFINITY;
        }
      }
      sums.add(acc);
      const int own_key = key + lane % 2 * 8 + row;
      const float mass = sums.mass(lane);
      if (lane % 4 < 2 && own_key < sk) score[own_key] = mass * share;
      finish_distances(n);
    });
#pragma unroll 1
    for (int n = turns; n < turns + kLineQueries / kLineKeys; ++n) finish_distances(n);
    if (call.kinds) average_later<kType, kD>(call);
  } else {
    const int first = set * 8 * plan.strip, query = own % 2 * 64 + warp * 16 + row;
    LineStats sums;
    const int64_t tiles = (sk + kRows - 1) / kRows;
    walk([&](int n) {
      const int key = first + n * kRows;
#pragma unroll
      for (int i = 0; i < 64; ++i) acc[i] = fmaf(acc[i], args.scale_log2, -sums.top[i / 2 % 2]);
      if (sq < kLineQueries || key + kRows > ahead + 1) {
#pragma unroll
        for (int i = 0; i < 64; ++i) {
          const int own_query = query + i / 2 % 2 * 8;
          if (own_query >= sq || key + i / 4 * 8 + column + i % 2 > ahead + own_query)
            acc[i] = -INFINITY;
        }
      }
      float own_sums[2][2];
      sums.add(acc, n == 0, own % 2 * 4 + warp, lane, own_sums);
      if (call.bands == nullptr || key >= sk) return;
      // The four lanes of two queries add up, and each has one of four sums
      const bool odd = lane & 1, high = lane & 2;
      const float mass =
          quad_sum_own({own_sums[0][0], own_sums[1][0], own_sums[0][1], own_sums[1][1]}, lane);
      const int64_t line = (head * tiles + key / kRows) * kLineQueries + query + (odd ? 8 : 0);
      call.bands[line * 2 + high] = log2_approx(mass) + (odd ? sums.top[1] : sums.top[0]);
    });
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = quad_sum(sums.sum[i]);
      if (column == 0) stats[set * kLineQueries + query + i * 8] = {sums.top[i], sum};
    }
  }
}

template <DType kType, int kD, bool kSums>
void launch_walk(const LinesCall& call, cudaStream_t stream) {
  const Probe& op = call.op;
  const LinesPlan& plan = kSums ? call.second : call.first;
  const auto map = [](const Tensor& x, int rows) {
    return make_tensor_map(
        kType, x.data,
        {x.shape[3], x.shape[1], x.shape[2], x.shape[0], x.strides[1], x.strides[2], x.strides[0]},
        rows);
  };
  using Smem = LinesSmem<kD, kSums>;
  launch<probe_lines_sm90_kernel<kType, kD, kSums>>(
      {std::max(plan.averaging + plan.items * plan.ctas, kSums && call.kinds ? plan.processors : 0),
       kLineThreads, sm90::shared_memory_bytes<Smem>(), stream, true},
      map(op.q, kLineQueries), map(op.k, kSums ? kLineKeys : Smem::kRows),
      LinesArgs{call, static_cast<float>(op.scale * 1.4426950408889634)});
}

}  // namespace

template <DType kType, int kD> void launch_stats_sm90(const LinesCall& call, cudaStream_t stream) {
  launch_walk<kType, kD, false>(call, stream);
}
template <DType kType, int kD> void launch_lines_sm90(const LinesCall& call, cudaStream_t stream) {
  launch_walk<kType, kD, true>(call, stream);
}

}  // namespace heddle
