#pragma once
#include <algorithm>

#include "attention/gather_keys.cuh"
#include "attention/gather_sm90.h"
#include "attention/softmax_sm90.cuh"
#include "common/sm90.cuh"
#include "common/tensor_map.h"
#include "common/tile.cuh"

// Attention of blocks of 64 queries over lists of key blocks on Hopper's matrix instructions; the
// equation and the order of keys are those of gather_sm80.cuh.
//
// A unit is 64 queries of two heads that share their list. A CTA takes one unit after another: one
// warp loads, two warpgroups compute, a head each, over the same keys. A copy moves a box of 8
// keys, wherever it stands: it is what the swizzle repeats after, and no block is shorter. 16 boxes
// are a tile. Sink tokens are filled up to whole boxes, so that a box is listed or in the window as
// a whole.
namespace heddle {
namespace {

constexpr int kGatherRows = 64, kGatherHeads = 2, kGatherBox = 8;

struct GatherStages {
  static constexpr int kKeys = 128, kBoxes = kKeys / kGatherBox, kStages = 2;
  static constexpr int kThreads = 128 * (kGatherHeads + 1);
};

template <int kD> struct GatherSmem90 {
  using Shape = GatherStages;
  sm90::Tile<kGatherRows, kD> q[kGatherHeads];
  sm90::Tile<Shape::kKeys, kD> k[Shape::kStages], v[Shape::kStages];
  int boxes[Shape::kStages][Shape::kBoxes];  // first keys, -1 where nobody sees one
  sm90::Barrier k_full[Shape::kStages], k_empty[Shape::kStages];
  sm90::Barrier v_full[Shape::kStages], v_empty[Shape::kStages];
};

struct GatherArgs90 {
  GatherLists blocks;
  MaskView mask;
  int sq, sk, hq, hk, group, row_tiles, units;
  float scale_log2, scale, soft_cap;
  const uint16_t *q, *k, *v;
  uint16_t* out;
  Strides q_strides, k_strides, v_strides, out_strides;
  float* lse;
};

// 64 queries of two heads
struct GatherUnit {
  int batch, kv_head, head, row0, rows;
  // Heads of a list one after the other, for its keys to be in L2
  __device__ GatherUnit(const GatherArgs90& args, int unit) {
    const int pairs = args.group / kGatherHeads;
    const int pair = unit % pairs, tile = unit / pairs % args.row_tiles;
    const int above = unit / pairs / args.row_tiles;
    kv_head = above % args.hk;
    batch = above / args.hk;
    head = kv_head * args.group + pair * kGatherHeads;
    row0 = tile * kGatherRows;
    rows = min(args.sq - row0, kGatherRows);
  }
  __device__ GatherKeys keys(const GatherArgs90& args) const {
    return {args.blocks, args.mask,         batch,     head, args.hq, row0,
            row0 + rows, args.sk - args.sq, kGatherBox};
  }
};

template <DType kType, int kD>
__global__ void __launch_bounds__(GatherStages::kThreads, 1)
    gather_sm90_kernel(const __grid_constant__ sm90::TensorMap gmem_k,
                       const __grid_constant__ sm90::TensorMap gmem_v,
                       const __grid_constant__ GatherArgs90 args) {
  using namespace sm90;
  using Shape = GatherStages;
  constexpr int kKeys = Shape::kKeys, kBoxes = Shape::kBoxes, kStages = Shape::kStages;
  constexpr int kComputing = 128 * kGatherHeads;
  auto& smem = shared_memory<GatherSmem90<kD>>();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      smem.k_full[stage].init(1);
      smem.v_full[stage].init(1);
      smem.k_empty[stage].init(kComputing / 32);
      smem.v_empty[stage].init(kComputing / 32);
    }
    fence_barrier_init();
    prefetch(gmem_k);
    prefetch(gmem_v);
  }
  __syncthreads();
  const int step = static_cast<int>(gridDim.x);

  if (warp >= kComputing / 32) {
    lower_registers<40>();
    if (warp > kComputing / 32) return;
    uint32_t loaded = 0;
    for (int i = static_cast<int>(blockIdx.x); i < args.units; i += step) {
      const GatherUnit unit(args, i);
      const GatherKeys keys = unit.keys(args);
      // a lane copies one box and looks where it stands a tile ahead
      int next = lane < kBoxes ? keys.at(lane * kGatherBox) : -1;
      for (int n = 0; n < keys.count; n += kKeys, ++loaded) {
        const Turn<kStages> turn(loaded);
        const int key = next;
        next = lane < kBoxes ? keys.at(n + kKeys + lane * kGatherBox) : -1;
        auto load = [&](auto& tile, Barrier& full, const TensorMap& map) {
          if (lane == 0) full.arrive_expect(tile.kBytes);
          __syncwarp();
          if (lane >= kBoxes) return;
          // what lies outside arrives as zeros
          for (int column = 0; column < kD; column += 64)
            copy_to_smem(tile.panel(column) + lane * kGatherBox * 128, map, full, column,
                         key < 0 ? args.sk : key, unit.kv_head, unit.batch, Keep::kNormal);
        };
        smem.k_empty[turn.stage].wait(turn.parity ^ 1);
        if (lane < kBoxes) smem.boxes[turn.stage][lane] = key;
        __syncwarp();
        load(smem.k[turn.stage], smem.k_full[turn.stage], gmem_k);
        smem.v_empty[turn.stage].wait(turn.parity ^ 1);
        load(smem.v[turn.stage], smem.v_full[turn.stage], gmem_v);
      }
    }
    return;
  }

  raise_registers<232>();
  const int own = warp / 4, thread = threadIdx.x % 128;
  const int row = warp % 4 * 16 + lane / 4;  // and the one 8 below
  float acc_s[kKeys / 2], acc_o[kD / 2];
  uint32_t frag_p[kKeys / 16][4];
  RowSoftmax rows;
  const ScoreMap map{args.scale, args.soft_cap, 0};
  const bool mapped = args.soft_cap > 0 || !(args.scale_log2 > 0);
  // mapped scores are in log2 units already
  const float to_log2 = mapped ? 1.f : args.scale_log2;
  auto sync = [&] { named_barrier_sync(1 + own, 128); };
  auto release = [&](Barrier& empty) {
    if (lane == 0) empty.arrive();
  };

  uint32_t used = 0;
  for (int i = static_cast<int>(blockIdx.x); i < args.units; i += step) {
    const GatherUnit unit(args, i);
    const GatherKeys keys = unit.keys(args);
    const int head = unit.head + own;

    // all have done their products with q of the unit before
    sync();
    for (int i = thread; i < kGatherRows * kD / 8; i += 128) {
      const int to = i / (kD / 8), column = i % (kD / 8) * 8;
      if (to < unit.rows) {
        store_16_bytes(smem.q[own].address(to, column), args.q + unit.batch * args.q_strides.batch +
                                                            (unit.row0 + to) * args.q_strides.row +
                                                            head * args.q_strides.head + column);
      } else {
        store_zero(smem.q[own].address(to, column));
      }
    }
    fence_async_smem();
    sync();

    const int position[2] = {keys.first + row, keys.first + row + 8};
    rows.clear();
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) acc_o[i] = 0;

#pragma unroll 1
    for (int n = 0; n < keys.count; n += kKeys, ++used) {
      const Turn<kStages> turn(used);
      smem.k_full[turn.stage].wait(turn.parity);
      wgmma_fence(acc_s);
#pragma unroll
      for (int d = 0; d < kD; d += 16)
        wgmma<kType, Major::kK>(acc_s, smem.q[own].k_major(0, d), smem.k[turn.stage].k_major(0, d),
                                d > 0);
      wgmma_commit();
      // whether every row sees every key
      const int* boxes = smem.boxes[turn.stage];
      bool whole = true;
      if (lane < kBoxes) {
        const int t = boxes[lane], its = n + lane * kGatherBox, end = t + kGatherBox - 1;
        whole = t >= 0 && (its < keys.listed ? end <= keys.first - keys.window
                                             : t > keys.last - keys.window && end <= keys.first);
      }
      whole = __all_sync(~0u, whole);
      wgmma_wait<0>(acc_s);
      if (mapped) {
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) acc_s[i] = map(acc_s[i], 0);
      }
      if (!whole) {
#pragma unroll
        for (int box = 0; box < kBoxes; ++box) {
          const int first = boxes[box], t = first + lane % 4 * 2;
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (first < 0 || !keys.sees(position[i / 2], n + box * kGatherBox, t + i % 2))
              acc_s[box * 4 + i] = -INFINITY;
        }
      }
      __syncwarp();  // all lanes have looked at the boxes
      release(smem.k_empty[turn.stage]);
      if (rows.update(acc_s, to_log2)) {
#pragma unroll
        for (int i = 0; i < kD / 2; ++i) acc_o[i] *= rows.shrink[i / 2 % 2];
      }
      pack_weights<kType>(frag_p, acc_s);
      smem.v_full[turn.stage].wait(turn.parity);
      // keys behind the last may hold anything, and zero weights don't silence NaN
      const int left = keys.count - n;
      if (left < kKeys && left % kGatherBox != 0) {
        for (int i = threadIdx.x; i < (kGatherBox - left % kGatherBox) * (kD / 8); i += kComputing)
          store_zero(smem.v[turn.stage].address(left + i / (kD / 8), i % (kD / 8) * 8));
        fence_async_smem();
        named_barrier_sync(1 + kGatherHeads, kComputing);
      }
      wgmma_fence(acc_o);
#pragma unroll
      for (int k = 0; k < kKeys; k += 16)
        wgmma<kType, Major::kMN>(acc_o, frag_p[k / 16], smem.v[turn.stage].mn_major(k), true);
      wgmma_commit();
      wgmma_wait<0>(acc_o);
      release(smem.v_empty[turn.stage]);
    }

    auto out_of = [&](int to) {
      return args.out + unit.batch * args.out_strides.batch +
             (unit.row0 + to) * args.out_strides.row + head * args.out_strides.head;
    };
    float lse_log2[2];
    uint32_t poisoned = 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = rows.total(r);
      const RowEnd end(rows.row_max[r] * to_log2, sum, nullptr);
      lse_log2[r] = end.lse_log2;
      if (row + 8 * r >= unit.rows) continue;
      uint16_t* out = out_of(row + 8 * r);
      float total = 0;
#pragma unroll
      for (int i = 2 * r; i < kD / 2; i += 4) {
        const float a = acc_o[i] * end.factor, b = acc_o[i + 1] * end.factor;
        total += a + b;
        *reinterpret_cast<uint32_t*>(out + i / 4 * 8 + lane % 4 * 2) = pack<kType>(a, b);
      }
      if (total != total) poisoned |= 1u << (lane / 4 + 8 * r);
      if (lane % 4 == 0)
        args.lse[(static_cast<int64_t>(unit.batch) * args.hq + head) * args.sq + unit.row0 + row +
                 8 * r] = end.lse_log2 * kLn2;
    }
    // once more the warp's rows that came out as no number
    for (uint32_t left = __reduce_or_sync(~0u, poisoned); left != 0; left &= left - 1) {
      const int its = __ffs(static_cast<int>(left)) - 1, to = warp % 4 * 16 + its;
      const auto rows_of = [&](const uint16_t* x, const Strides& strides) {
        return [&, from = x + unit.batch * strides.batch + unit.kv_head * strides.head](int n) {
          return from + keys.at(n) * strides.row;
        };
      };
      float values[kD / 32] = {};
      attend_seen<kType>(
          values,
          args.q + unit.batch * args.q_strides.batch + (unit.row0 + to) * args.q_strides.row +
              head * args.q_strides.head,
          rows_of(args.k, args.k_strides), rows_of(args.v, args.v_strides), kD, kD, 0, keys.count,
          [&](int n) {
            const int t = keys.at(n);
            return t >= 0 && keys.sees(keys.first + to, n, t);
          },
          [&](float product, int) { return mapped ? map(product, 0) : product * args.scale_log2; },
          __shfl_sync(~0u, its < 8 ? lse_log2[0] : lse_log2[1], its % 8 * 4), lane);
      __syncwarp();
#pragma unroll
      for (int c = 0; c < kD / 32; ++c)
        out_of(to)[32 * c + lane] = static_cast<uint16_t>(pack<kType>(values[c], 0));
    }
  }
}

}  // namespace

template <DType kType, int kD>
void launch_gather_sm90(const GatherCall& call, cudaStream_t stream) {
  GatherArgs90 args{};
  args.blocks = call.blocks;
  args.mask = call.lists.mask;
  args.sq = static_cast<int>(call.sq);
  args.sk = static_cast<int>(call.sk);
  args.hq = static_cast<int>(call.hq);
  args.hk = static_cast<int>(call.hk);
  args.group = static_cast<int>(call.hq / call.hk);
  args.row_tiles = (args.sq + kGatherRows - 1) / kGatherRows;
  args.units = static_cast<int>(call.b) * args.row_tiles * (args.hq / kGatherHeads);
  args.scale_log2 = call.scale * sm90::kLog2e;
  args.scale = call.scale;
  args.soft_cap = call.soft_cap;
  args.q = static_cast<const uint16_t*>(call.q);
  args.k = static_cast<const uint16_t*>(call.k);
  args.v = static_cast<const uint16_t*>(call.v);
  args.out = static_cast<uint16_t*>(call.out);
  args.q_strides = call.q_strides;
  args.k_strides = call.k_strides;
  args.v_strides = call.v_strides;
  args.out_strides = call.out_strides;
  args.lse = call.lse;
  const auto map = [&](const void* data, const Strides& strides) {
    return make_tensor_map(kType, data,
                           {kD, call.sk, call.hk, call.b, strides.row, strides.head, strides.batch},
                           kGatherBox);
  };
  launch<gather_sm90_kernel<kType, kD>>(
      {std::min(args.units, call.processors), GatherStages::kThreads,
       sm90::shared_memory_bytes<GatherSmem90<kD>>(), stream},
      map(call.k, call.k_strides), map(call.v, call.v_strides), args);
}

}  // namespace heddle
