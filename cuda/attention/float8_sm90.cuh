#pragma once
#include "attention/forward_sm90.cuh"

// Softmax attention in e4m3, whose numbers are multiplied by a scale for each head:
//
//   S[p,t] = scale * q_scale * k_scale * Q[p,d] * K[t,d]   as forward_sm90.cuh has it
//   out    = v_scale * softmax(S) V                        lse = ln(sum(exp(S)))
//
// Tiles, their order and who loads and computes are those of forward_sm90.cuh. Operands of 8 bits
// must lie along what is reduced, which for values are the keys: the warps of warpgroup 0 that
// don't load transpose v, 16 keys by 32 columns at a time, and give what they wrote to the others.
//
// A thread's scores of 16 keys are not in the order in which an operand A has 16 columns: column
// 4q + i holds key 2q + i % 2 + 8 * (i / 2). Nobody notices if the transposed values have their
// keys in the same order, and that is how two transposed 8x8 matrices of pairs come out of
// ldmatrix.
//
// Weights are multiplied by 2^8, for e4m3 ends at 448 and its smallest normal number is 2^-6. The
// matrix units keep some 14 bits of a sum, so that of each key tile begins at zero and is added to
// those of before in f32, which also shrinks them.
namespace heddle {
namespace {

struct Float8Tile {
  static constexpr int kWarpgroups = 2;
  static constexpr int kQueries = 64 * kWarpgroups;
  static constexpr int kKeys = 128;  // one row of a panel, transposed
  static constexpr int kBuffers = 2;
  static constexpr int kStages = 3;   // of k and v; transposed values have two
  static constexpr int kTurners = 3;  // warps that transpose
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  // 504 for one thread of each warpgroup
  static constexpr int load_registers(int d) { return d == 64 ? 56 : 40; }
  static constexpr int compute_registers(int d) { return (504 - load_registers(d)) / kWarpgroups; }
};

// Tiles of e4m3 are tiles of pairs to copies, addresses and descriptors
template <int kD> struct Float8Smem {
  using Shape = Float8Tile;
  sm90::Tile<Shape::kQueries, 64> q[Shape::kBuffers];
  sm90::Tile<Shape::kKeys, 64> k[Shape::kStages], v[Shape::kStages];
  sm90::Tile<kD, 64> turned[2];  // [d, keys]
  sm90::Tile<Shape::kQueries, kD> out;
  ForwardWork work[Shape::kBuffers];
  sm90::Barrier q_full[Shape::kBuffers], q_empty[Shape::kBuffers];
  sm90::Barrier k_full[Shape::kStages], k_empty[Shape::kStages];
  sm90::Barrier v_full[Shape::kStages], v_empty[Shape::kStages];
  sm90::Barrier turned_full[2], turned_empty[2];
};

struct Float8Args : ForwardArgs {
  const float *q_scale, *k_scale, *v_scale;
  int64_t q_scale_stride, k_scale_stride, v_scale_stride;
  bool half;  // out is f16

  __device__ __forceinline__ float score_scale(int head) const {
    float scale = scale_log2;
    if (q_scale) scale *= q_scale[head * q_scale_stride];
    if (k_scale) scale *= k_scale[head / group * k_scale_stride];
    return scale;
  }
  __device__ __forceinline__ float value_scale(int head) const {
    return v_scale ? v_scale[head / group * v_scale_stride] : 1;
  }
};

// Transposes a tile of v, of which the keys from `left` on count as zero, by `warps` warps
template <int kD, class Values, class Turned>
__device__ __forceinline__ void turn_values(const Values& v, const Turned& turned, int left,
                                            int warp, int warps, int lane) {
  constexpr int kBlocks = 8;  // of 16 keys
  // rows of 128 bytes whose numbers differ by 8 share banks: half of the lanes swap their columns
  const int swap = lane / 16;
  const uint32_t even = swap ? 0x7531 : 0x6420, odd = swap ? 0x6420 : 0x7531;
#pragma unroll 4
  for (int i = warp; i < kBlocks * kD / 32; i += warps) {
    const int key = i % kBlocks * 16, column = i / kBlocks * 32;
    // keys 0 and 8 of the first 16 columns, then of the others
    uint32_t pairs[4];
    sm90::ldmatrix_x4_transposed(v.address(key + lane % 16, (column + lane / 16 * 16) / 2), pairs);
    if (key + 16 > left) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int first = key + m % 2 * 8 + lane % 4 * 2;  // the upper half is of the next
        pairs[m] &= (first < left ? 0xffffu : 0) | (first + 1 < left ? 0xffff0000u : 0);
      }
    }
    const int row = lane % 8, other = (row >= 4) ^ (lane / 8 % 2);
    sm90::stmatrix_x4(turned.address(column + lane / 16 * 16 + 2 * row + other, key / 2),
                      __byte_perm(pairs[0], pairs[1], even), __byte_perm(pairs[0], pairs[1], odd),
                      __byte_perm(pairs[2], pairs[3], even), __byte_perm(pairs[2], pairs[3], odd));
  }
}

template <int kD>
__global__ void __launch_bounds__(Float8Tile::kThreads, 1)
    float8_sm90_kernel(const __grid_constant__ sm90::TensorMap gmem_q,
                       const __grid_constant__ sm90::TensorMap gmem_k,
                       const __grid_constant__ sm90::TensorMap gmem_v,
                       const __grid_constant__ sm90::TensorMap gmem_out, const Float8Args args) {
  using namespace sm90;
  using Shape = Float8Tile;
  constexpr DType kType = DType::kE4M3;
  constexpr int kQueries = Shape::kQueries, kKeys = Shape::kKeys, kStages = Shape::kStages;
  constexpr int kBuffers = Shape::kBuffers, kWarpgroups = Shape::kWarpgroups;
  constexpr int kTurners = Shape::kTurners, kLift = 8;
  auto& smem = shared_memory<Float8Smem<kD>>();
  // the same in all lanes, which the compiler cannot know of threadIdx
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  const int thread = threadIdx.x % 128, lane = thread % 32;
  const int warp = __shfl_sync(~0u, thread / 32, 0);
  auto release = [&](Barrier& empty) {
    __syncwarp();
    if (lane == 0) empty.arrive();
  };

  if (threadIdx.x == 0) {
    for (int buffer = 0; buffer < kBuffers; ++buffer) {
      smem.q_full[buffer].init(1);
      smem.q_empty[buffer].init(kWarpgroups * 4 + kTurners);
      smem.turned_full[buffer].init(kTurners);
      smem.turned_empty[buffer].init(kWarpgroups * 4);
    }
    for (int stage = 0; stage < kStages; ++stage) {
      smem.k_full[stage].init(1);
      smem.v_full[stage].init(1);
      smem.k_empty[stage].init(kWarpgroups * 4);
      smem.v_empty[stage].init(kTurners);
    }
    fence_barrier_init();
  }
  __syncthreads();

  if (warpgroup == 0) {
    lower_registers<Shape::load_registers(kD)>();
    if (warp == 0) {
      if (!elect_one()) return;
      prefetch(gmem_q);
      prefetch(gmem_k);
      prefetch(gmem_v);
      ForwardOrder<kQueries> order{args};
      ForwardWork work = order.at(blockIdx.x);
      uint32_t visit = 0, loaded = 0;  // tiles of q, and of k and v
      for (; work.row >= 0; ++visit) {
        find_keys<kQueries, kKeys>(args, work);
        const int kv_head = work.head / args.group;
        auto load = [&](auto& tiles, Barrier* full, Barrier* empty, const TensorMap& map, int j) {
          const Turn<kStages> turn(loaded + j);
          empty[turn.stage].wait(turn.parity ^ 1);
          full[turn.stage].arrive_expect(tiles[0].kBytes);
          tiles[turn.stage].load(map, full[turn.stage],
                                 work.k_begin + (work.key_end - 1 - j) * kKeys, kv_head, work.batch,
                                 Keep::kLong);
        };
        load(smem.k, smem.k_full, smem.k_empty, gmem_k, 0);
        const Turn<kBuffers> q(visit);
        smem.q_empty[q.stage].wait(q.parity ^ 1);
        smem.work[q.stage] = work;
        smem.q_full[q.stage].arrive_expect(smem.q[0].kBytes);
        smem.q[q.stage].load(gmem_q, smem.q_full[q.stage], work.q_begin + work.row, work.head,
                             work.batch, Keep::kShortly);
        for (int j = 1; j < work.key_tiles; ++j) {
          load(smem.k, smem.k_full, smem.k_empty, gmem_k, j);
          load(smem.v, smem.v_full, smem.v_empty, gmem_v, j - 1);
        }
        const int ticket = static_cast<int>(gridDim.x) + fetch_add(&args.tickets[0], 1);
        load(smem.v, smem.v_full, smem.v_empty, gmem_v, work.key_tiles - 1);
        loaded += work.key_tiles;
        work = order.at(ticket);
      }
      const Turn<kBuffers> q(visit);
      smem.q_empty[q.stage].wait(q.parity ^ 1);
      smem.work[q.stage] = work;
      smem.q_full[q.stage].arrive();
      // the last CTA leaves the counters as it found them
      if (fetch_add(&args.tickets[1], 1) == static_cast<int>(gridDim.x) - 1)
        args.tickets[0] = args.tickets[1] = 0;
      return;
    }
    uint32_t used = 0;
    for (uint32_t visit = 0;; ++visit) {
      const Turn<kBuffers> q(visit);
      smem.q_full[q.stage].wait(q.parity);
      const ForwardWork work = smem.work[q.stage];
      if (work.row < 0) return;
      release(smem.q_empty[q.stage]);
      for (int j = 0; j < work.key_tiles; ++j, ++used) {
        const Turn<kStages> v(used);
        const Turn<2> to(used);
        smem.v_full[v.stage].wait(v.parity);
        smem.turned_empty[to.stage].wait(to.parity ^ 1);
        // values behind the end of a sequence belong to somebody else and may be anything: zero
        // weights don't silence what is not a number
        turn_values<kD>(smem.v[v.stage], smem.turned[to.stage],
                        work.sk - (work.key_end - 1 - j) * kKeys, warp - 1, kTurners, lane);
        fence_async_smem();
        release(smem.turned_full[to.stage]);
        release(smem.v_empty[v.stage]);
      }
    }
  }

  raise_registers<Shape::compute_registers(kD)>();
  const int own = warpgroup - 1;
  const int own_row = own * 64 + warp * 16;              // first of this warp's rows in the tile
  float acc_s[kKeys / 2], acc_t[kD / 2], acc_o[kD / 2];  // acc_t is of one key tile
  uint32_t frag_p[kKeys / 32][4];
  RowSoftmax rows;
  RowBounds bounds;

  auto issue_scores = [&](uint32_t stage, uint32_t buffer) {
    wgmma_fence(acc_s);
#pragma unroll
    for (int d = 0; d < kD; d += 32)
      wgmma<kType, Major::kK>(acc_s, smem.q[buffer].k_major(own * 64, d / 2),
                              smem.k[stage].k_major(0, d / 2), d > 0);
    wgmma_commit();
  };
  auto issue_values = [&](uint32_t stage) {
    wgmma_fence(acc_t);
#pragma unroll
    for (int k = 0; k < kKeys; k += 32)
      wgmma<kType, Major::kK>(acc_t, frag_p[k / 32], smem.turned[stage].k_major(0, k / 2), k > 0);
    wgmma_commit();
  };
  // accumulators of 16 keys are half of an operand A, in the order of the transposed values
  auto pack_weights = [&] {
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
      const float* of = acc_s + i / 2 * 8 + i % 2 * 2;
      frag_p[i / 4][i % 4] = pack_e4m3(of[0], of[1], of[4], of[5]);
    }
  };
  // named barrier 1 + w stands for the turn of computing warpgroup w
  auto await_turn = [&] { named_barrier_sync(1 + own, 256); };
  auto pass_turn = [&] { named_barrier_arrive(1 + (own + 1) % kWarpgroups, 256); };

  if (own == 0) named_barrier_arrive(1, 256);
  uint32_t visit = 0, used = 0;  // tiles of q, and of k and v
  for (;; ++visit) {
    const Turn<kBuffers> q(visit);
    smem.q_full[q.stage].wait(q.parity);
    const ForwardWork work = smem.work[q.stage];
    if (work.row < 0) break;
    const int row = work.row + own_row + lane / 4, diagonal = work.sk - work.sq;
    const int key_end = __shfl_sync(~0u, work.key_end, 0);
    const int key_tiles = __shfl_sync(~0u, work.key_tiles, 0);
    // rows are shifted by maxima of products, which takes a factor that is positive: of a negative
    // one the products change their signs instead
    const float scale_log2 = args.score_scale(work.head);
    const float size_log2 = fabsf(scale_log2) < 1e-30f ? 1e-30f : fabsf(scale_log2);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      bounds.position[r] = row + 8 * r + diagonal;
      bounds.until[r] = args.causal ? min(work.sk, bounds.position[r] + 1) : work.sk;
    }
    rows.clear();
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) acc_o[i] = 0;

    auto soften = [&](int j, bool masked) {
      if (scale_log2 < 0) {
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) acc_s[i] = -acc_s[i];
      }
      if (masked) mask_scores(acc_s, bounds, (key_end - 1 - j) * kKeys, args.window, lane);
      rows.update<0, kLift>(acc_s, size_log2);
    };
    // `shrink` is of the maximum that the weights of acc_t are relative to
    auto add_values = [&](const float(&shrink)[2]) {
#pragma unroll
      for (int i = 0; i < kD / 2; ++i) acc_o[i] = fmaf(acc_o[i], shrink[i / 2 % 2], acc_t[i]);
    };
    auto step = [&](int j, bool masked) {
      const Turn<kStages> k(used + j);
      const Turn<2> v(used + j - 1);
      const float shrink[2] = {rows.shrink[0], rows.shrink[1]};
      smem.k_full[k.stage].wait(k.parity);
      await_turn();
      issue_scores(k.stage, q.stage);
      smem.turned_full[v.stage].wait(v.parity);
      issue_values(v.stage);
      pass_turn();
      wgmma_wait<1>(acc_s);
      release(smem.k_empty[k.stage]);
      soften(j, masked);
      wgmma_wait<0>(acc_t);
      release(smem.turned_empty[v.stage]);
      pack_weights();
      add_values(shrink);
    };

    const Turn<kStages> k(used);
    smem.k_full[k.stage].wait(k.parity);
    issue_scores(k.stage, q.stage);
    wgmma_wait<0>(acc_s);
    release(smem.k_empty[k.stage]);
    soften(0, true);
    pack_weights();
    // key tiles that the first row sees whole, and where the last row's window begins
    const int whole_end = (args.causal ? max(work.row + diagonal + 1, 0) : work.sk) / kKeys;
    const int whole_begin =
        args.window ? max(work.row + kQueries + diagonal - args.window + kKeys - 1, 0) / kKeys : 0;
    int j = 1;
#pragma unroll 1
    for (; j < key_tiles && key_end - 1 - j >= whole_end; ++j) step(j, true);
#pragma unroll 1
    for (; j < key_tiles && key_end - 1 - j >= whole_begin; ++j) step(j, false);
#pragma unroll 1
    for (; j < key_tiles; ++j) step(j, true);
    release(smem.q_empty[q.stage]);
    used += key_tiles;
    const Turn<2> v(used - 1);
    smem.turned_full[v.stage].wait(v.parity);
    issue_values(v.stage);
    wgmma_wait<0>(acc_t);
    release(smem.turned_empty[v.stage]);
    add_values(rows.shrink);

    const int64_t lse_row =
        (static_cast<int64_t>(work.batch) * args.hq + work.head) * args.sq + work.q_begin;
    const float value_scale = args.value_scale(work.head);
    float lse_log2[2];
    int poisoned[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const RowEnd end(rows.row_max[r] * size_log2 - kLift, rows.total(r),
                       args.sink ? args.sink + work.head * args.sink_stride : nullptr);
      lse_log2[r] = end.lse_log2;
      if (lane % 4 == 0 && row + 8 * r < work.sq)
        args.lse[lse_row + row + 8 * r] = end.lse_log2 * kLn2;
      const float factor = end.factor * value_scale;
      float total = 0;
#pragma unroll
      for (int i = 2 * r; i < kD / 2; i += 4) {
        // a row without keys gives zero, whatever its masked values were
        acc_o[i] = end.factor == 0 ? 0 : acc_o[i] * factor;
        acc_o[i + 1] = end.factor == 0 ? 0 : acc_o[i + 1] * factor;
        total += acc_o[i] + acc_o[i + 1];
      }
      poisoned[r] = args.causal && total != total && row + 8 * r < work.sq;
      poisoned[r] |= __shfl_xor_sync(~0u, poisoned[r], 1);
      poisoned[r] |= __shfl_xor_sync(~0u, poisoned[r], 2);
    }
    auto pack_out = [&](float low, float high) {
      return args.half ? pack<DType::kF16>(low, high) : pack<DType::kBF16>(low, high);
    };
    // once the out before was read
    if (thread == 0) wait_copies_read<0>();
    named_barrier_sync(8 + own, 128);
#pragma unroll
    for (int i = 0; i < kD / 2; i += 8)
      stmatrix_x4(smem.out.address(own_row + lane % 16, i * 2 + lane / 16 * 8),
                  pack_out(acc_o[i], acc_o[i + 1]), pack_out(acc_o[i + 2], acc_o[i + 3]),
                  pack_out(acc_o[i + 4], acc_o[i + 5]), pack_out(acc_o[i + 6], acc_o[i + 7]));
    if (__any_sync(~0u, poisoned[0] | poisoned[1])) {
      const auto at = [&](const uint16_t* x, const Strides& strides, int head, int64_t begin) {
        return reinterpret_cast<const uint8_t*>(x) + work.batch * strides.batch +
               head * strides.head + begin * strides.row;
      };
      const int kv_head = work.head / args.group;
      for (int i = 0; i < 16; ++i) {
        const int from = i % 8 * 4, its_row = work.row + own_row + i;
        const float its_lse = __shfl_sync(~0u, i < 8 ? lse_log2[0] : lse_log2[1], from);
        if (!__shfl_sync(~0u, i < 8 ? poisoned[0] : poisoned[1], from)) continue;
        const int position = its_row + diagonal;
        float values[kD / 32] = {};
        attend_seen<kType>(
            values, at(args.q, args.q_strides, work.head, work.q_begin + its_row),
            KeyRows<uint8_t>{at(args.k, args.k_strides, kv_head, work.k_begin), args.k_strides.row},
            KeyRows<uint8_t>{at(args.v, args.v_strides, kv_head, work.k_begin), args.v_strides.row},
            args.d, args.dv, args.window ? max(position - args.window + 1, 0) : 0,
            min(work.sk, position + 1), [](int) { return true; },
            [&](float product, int) { return product * scale_log2; }, its_lse, lane);
        __syncwarp();
#pragma unroll
        for (int c = 0; c < kD / 32; ++c)
          store_16_bits(smem.out.address(own_row + i, 32 * c + lane / 8 * 8) + lane % 8 * 2,
                        static_cast<uint16_t>(pack_out(values[c] * value_scale, 0)));
      }
    }
    // every writer fences before a copy reads this
    fence_async_smem();
    named_barrier_sync(8 + own, 128);
    const int first_row = work.row + own * 64;
    // the rows behind the last one may be those of another sequence
    if (args.cu_seqlens_q && first_row + 64 > work.sq) {
      uint16_t* out = args.out + work.head * args.out_strides.head;
      for (int i = thread; i < 64 * kD / 8; i += 128) {
        const int r = i / (kD / 8), column = i % (kD / 8) * 8;
        if (first_row + r < work.sq && column < args.dv)
          copy_16_bytes(out + (work.q_begin + first_row + r) * args.out_strides.row + column,
                        smem.out.address(own * 64 + r, column));
      }
    } else if (thread == 0) {
      for (int column = 0; column < kD; column += 64)
        copy_to_gmem(gmem_out, smem.out.panel(column) + own * 64 * 128, column,
                     work.q_begin + first_row, work.head, work.batch);
      commit_copies();
    }
  }
  // shared memory must outlive the copies that read it
  if (thread == 0) wait_copies_read<0>();
}

}  // namespace

template <int kD> void launch_float8_sm90(const ForwardCall& call, cudaStream_t stream) {
  using Shape = Float8Tile;
  Float8Args args{forward_args(call, Shape::kQueries)};
  args.q_scale = call.q_scale;
  args.k_scale = call.k_scale;
  args.v_scale = call.v_scale;
  args.q_scale_stride = call.q_scale_stride;
  args.k_scale_stride = call.k_scale_stride;
  args.v_scale_stride = call.v_scale_stride;
  args.half = call.out_dtype == DType::kF16;
  const auto map = [&](const void* data, int64_t d, int64_t s, int64_t h, const Strides& strides,
                       int rows) {
    return make_tensor_map(
        DType::kE4M3, data,
        {d / 2, s, h, call.b, strides.row / 2, strides.head / 2, strides.batch / 2}, rows);
  };
  const Strides& out = call.out_strides;
  launch<float8_sm90_kernel<kD>>(
      {std::min(args.tiles, call.processors), Shape::kThreads,
       sm90::shared_memory_bytes<Float8Smem<kD>>(), stream},
      map(call.q, call.d, call.sq, call.hq, call.q_strides, Shape::kQueries),
      map(call.k, call.d, call.sk, call.hk, call.k_strides, Shape::kKeys),
      map(call.v, call.dv, call.sk, call.hk, call.v_strides, Shape::kKeys),
      make_tensor_map(call.out_dtype, call.out,
                      {call.dv, call.sq, call.hq, call.b, out.row, out.head, out.batch}, 64),
      args);
}

}  // namespace heddle
