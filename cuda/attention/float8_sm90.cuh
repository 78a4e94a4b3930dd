#pragma once
#include "attention/forward_sm90.cuh"

// Softmax attention in e4m3, whose numbers are multiplied by a scale for each head:
//
//   S[p,t] = scale * q_scale * k_scale * Q[p,d] * K[t,d]   as forward_sm90.cuh has it
//   out    = v_scale * softmax(S) V                        lse = ln(sum(exp(S)))
//
// Tiles, their order and who loads and computes are those of forward_sm90.cuh. Operands of 8 bits
// must lie along what is reduced, which for values are the keys: a kernel that runs before
// transposes v in global memory, a key tile after the other.
//
// A thread's scores of 16 keys are not in the order in which an operand A has 16 columns: column
// 4q + i holds key 2q + i % 2 + 8 * (i / 2). Nobody notices if the transposed values have their
// keys in the same order.
//
// Weights are multiplied by 2^8, for e4m3 ends at 448 and its smallest normal number is 2^-6. The
// matrix units keep some 14 bits of a sum, so that sums of more than kSettled key tiles are added
// in f32, in shared memory.
namespace heddle {
namespace {

template <int kD> struct Float8Tile {
  // exp2 bounds d = 64: a third warpgroup leaves fewer clocks without one
  static constexpr int kWarpgroups = kD == 64 ? 3 : 2;
  static constexpr int kQueries = 64 * kWarpgroups;
  static constexpr int kKeys = turned_keys(kD);
  static constexpr int kBuffers = 2, kStages = 3;
  static constexpr int kSettled = 4;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  static constexpr int kLoadRegisters = kWarpgroups == 3 ? 32 : 24;
  static constexpr int kComputeRegisters = (512 - kLoadRegisters) / kWarpgroups / 8 * 8;
};

// Tiles of e4m3 are tiles of pairs to copies, addresses and descriptors
template <int kD> struct Float8Smem {
  using Shape = Float8Tile<kD>;
  sm90::Tile<Shape::kQueries, 64> q[Shape::kBuffers];
  sm90::Tile<Shape::kKeys, 64> k[Shape::kStages];
  sm90::Tile<kD, 64> v[Shape::kStages];  // [d, keys]
  sm90::Tile<64, kD> out[Shape::kWarpgroups];
  ForwardWork work[Shape::kBuffers];
  sm90::Barrier q_full[Shape::kBuffers], q_empty[Shape::kBuffers];
  sm90::Barrier k_full[Shape::kStages], k_empty[Shape::kStages];
  sm90::Barrier v_full[Shape::kStages], v_empty[Shape::kStages];
};

struct Float8Args : ForwardArgs {
  HeadScales scales;
  bool half;        // out is f16
  uint8_t* turned;  // [b, hk, key tile, d, key], of zeros behind the end of a sequence
  int key_tiles;    // of one head
};

// The largest of each row's scores that this thread has, in chains that don't wait for each other
template <int kScores>
__device__ __forceinline__ void highest_scores(const float (&acc)[kScores], float (&highest)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float chains[4];
#pragma unroll
    for (int i = 2 * r; i < kScores; i += 4) {
      const float pair = fmaxf(acc[i], acc[i + 1]);
      chains[i / 4 % 4] = i < 16 ? pair : fmaxf(chains[i / 4 % 4], pair);
    }
    highest[r] = fmaxf(fmaxf(chains[0], chains[1]), fmaxf(chains[2], chains[3]));
  }
}

// The key tile of a head that is the first of a sequence
template <int kKeys>
__device__ __forceinline__ int first_key_tile(const ForwardArgs& args, int k_begin, int sequence) {
  return args.cu_seqlens_k ? k_begin / kKeys + sequence : 0;
}

// A CTA transposes a key tile of one head, each thread 16 keys of 8 columns. Keys behind the end of
// a sequence belong to somebody else and may be anything: they become zeros, since zero weights
// don't silence what is not a number.
template <int kD> __global__ void __launch_bounds__(kD) float8_turn_kernel(const Float8Args args) {
  using Shape = Float8Tile<kD>;
  constexpr int kKeys = Shape::kKeys;
  sm90::let_next_begin();
  const int tile = blockIdx.x % args.key_tiles, heads = args.hq / args.group;
  const int head = blockIdx.x / args.key_tiles % heads, batch = blockIdx.x / args.key_tiles / heads;
  const ForwardOrder<Shape::kQueries> order{args};
  const auto begin_of = [&](int sequence) {
    return order.offset(args.cu_seqlens_k, args.cu_k_stride, sequence, args.sk);
  };
  int begin = 0, end = args.sk, first = 0;
  if (args.cu_seqlens_k) {
    int sequence = 0;
    for (int above = args.sequences; above - sequence > 1;) {
      const int middle = (sequence + above) / 2;
      const bool later = first_key_tile<kKeys>(args, begin_of(middle), middle) > tile;
      (later ? above : sequence) = middle;
    }
    begin = begin_of(sequence);
    end = begin_of(sequence + 1);
    first = first_key_tile<kKeys>(args, begin, sequence);
  } else if (args.cache_seqlens) {
    end = min(max(args.cache_seqlens[batch * args.cache_stride], 0), args.sk);
  }
  const int lane = threadIdx.x % 32, column = threadIdx.x / 32 * 32 + lane % 4 * 8;
  const int inside = lane / 4 * 16;  // the first key, in the tile
  const int left =
      inside < kKeys && column < args.dv ? end - begin - (tile - first) * kKeys - inside : 0;
  const uint8_t* from = reinterpret_cast<const uint8_t*>(args.v) + batch * args.v_strides.batch +
                        head * args.v_strides.head + column +
                        (begin + (tile - first) * kKeys + inside) * args.v_strides.row;
  uint2 rows[16];
#pragma unroll
  for (int i = 0; i < 16; ++i)
    rows[i] =
        i < left ? *reinterpret_cast<const uint2*>(from + i * args.v_strides.row) : uint2{0, 0};
  uint8_t* to = args.turned + (int64_t{blockIdx.x} * kD + column) * 128 + inside;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t turned[4][4];  // [column, keys]
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const auto word = [&](int i) { return half ? rows[i].y : rows[i].x; };
      const auto pairs = [&](int i, uint32_t selector) {
        return __byte_perm(word(i), word(i + 1), selector);
      };
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const uint32_t selector = i == 0 ? 0x5140 : 0x7362;
        const uint32_t near = pairs(2 * q, selector), far = pairs(2 * q + 8, selector);
        turned[i][q] = __byte_perm(near, far, 0x5410);
        turned[i + 1][q] = __byte_perm(near, far, 0x7632);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      *reinterpret_cast<uint4*>(to + (4 * half + i) * 128) =
          uint4{turned[i][0], turned[i][1], turned[i][2], turned[i][3]};
  }
}

template <int kD>
__global__ void __launch_bounds__(Float8Tile<kD>::kThreads, 1)
    float8_sm90_kernel(const __grid_constant__ sm90::TensorMap gmem_q,
                       const __grid_constant__ sm90::TensorMap gmem_k,
                       const __grid_constant__ sm90::TensorMap gmem_v,
                       const __grid_constant__ sm90::TensorMap gmem_out, const Float8Args args) {
  using namespace sm90;
  using Shape = Float8Tile<kD>;
  constexpr DType kType = DType::kE4M3;
  constexpr int kQueries = Shape::kQueries, kKeys = Shape::kKeys, kStages = Shape::kStages;
  constexpr int kBuffers = Shape::kBuffers, kWarpgroups = Shape::kWarpgroups, kLift = 8;
  constexpr float kRoom = .75f;  // 2^(kLift + kRoom) is below 448
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
      smem.q_empty[buffer].init(kWarpgroups * 4);
    }
    for (int stage = 0; stage < kStages; ++stage) {
      smem.k_full[stage].init(1);
      smem.v_full[stage].init(1);
      smem.k_empty[stage].init(kWarpgroups * 4);
      smem.v_empty[stage].init(kWarpgroups * 4);
    }
    fence_barrier_init();
  }
  __syncthreads();

  if (warpgroup == 0) {
    lower_registers<Shape::kLoadRegisters>();
    if (warp == 0 && elect_one()) {
      prefetch(gmem_q);
      prefetch(gmem_k);
      prefetch(gmem_v);
      await_previous();
      ForwardOrder<kQueries> order{args};
      ForwardWork work = order.at(blockIdx.x);
      uint32_t visit = 0, loaded = 0;  // tiles of q, and of k and v
      for (; work.row >= 0; ++visit) {
        find_keys<kQueries, kKeys>(args, work);
        const int kv_head = work.head / args.group;
        const int turned = (work.batch * (args.hq / args.group) + kv_head) * args.key_tiles +
                           first_key_tile<kKeys>(args, work.k_begin, work.sequence);
        auto begin = [&](Barrier* full, Barrier* empty, int j, uint32_t bytes) {
          const Turn<kStages> turn(loaded + j);
          empty[turn.stage].wait(turn.parity ^ 1);
          full[turn.stage].arrive_expect(bytes);
          return turn.stage;
        };
        auto load_keys = [&](int j) {
          const uint32_t stage = begin(smem.k_full, smem.k_empty, j, smem.k[0].kBytes);
          smem.k[stage].load(gmem_k, smem.k_full[stage],
                             work.k_begin + (work.key_end - 1 - j) * kKeys, kv_head, work.batch,
                             Keep::kLong);
        };
        auto load_values = [&](int j) {
          const uint32_t stage = begin(smem.v_full, smem.v_empty, j, smem.v[0].kBytes);
          smem.v[stage].load(gmem_v, smem.v_full[stage], 0, turned + work.key_end - 1 - j, 0,
                             Keep::kLong);
        };
        load_keys(0);
        const Turn<kBuffers> q(visit);
        smem.q_empty[q.stage].wait(q.parity ^ 1);
        smem.work[q.stage] = work;
        smem.q_full[q.stage].arrive_expect(smem.q[0].kBytes);
        smem.q[q.stage].load(gmem_q, smem.q_full[q.stage], work.q_begin + work.row, work.head,
                             work.batch, Keep::kShortly);
        for (int j = 1; j < work.key_tiles; ++j) {
          load_keys(j);
          load_values(j - 1);
        }
        const int ticket = static_cast<int>(gridDim.x) + fetch_add(&args.tickets[0], 1);
        load_values(work.key_tiles - 1);
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
    }
    return;
  }

  raise_registers<Shape::kComputeRegisters>();
  const int own = warpgroup - 1;
  const int own_row = own * 64 + warp * 16;  // first of this warp's rows in the tile
  float acc_s[kKeys / 2], acc_o[kD / 2];
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
    wgmma_fence(acc_o);
#pragma unroll
    for (int k = 0; k < kKeys; k += 32)
      wgmma<kType, Major::kK>(acc_o, frag_p[k / 32], smem.v[stage].k_major(0, k / 2), true);
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
    const int kv_head = work.head / args.group;
    const float scale_log2 = args.scale_log2 * args.scales.score(work.head, kv_head);
    const float size_log2 = fabsf(scale_log2) < 1e-30f ? 1e-30f : fabsf(scale_log2);
    bounds = bounds_of(args, work, row);
    rows.clear();
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) acc_o[i] = 0;

    // sums in f32, and what they are relative to
    float settled[kD / 2] = {}, settled_max[2] = {-INFINITY, -INFINITY};
    // Moves the maxima that scores of this tile are above by more than e4m3 has room for; whether
    // one did, and sums of before have to shrink
    auto raise = [&](int j, bool masked) {
      if (masked) {
        if (scale_log2 < 0) {
#pragma unroll
          for (int i = 0; i < kKeys / 2; ++i) acc_s[i] = -acc_s[i];
        }
        mask_scores(acc_s, bounds, (key_end - 1 - j) * kKeys, args.window, lane);
      }
      float highest[2];
      highest_scores(acc_s, highest);
      bool above = false;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        highest[r] *= size_log2;
        above |= highest[r] > rows.row_max[r] + kRoom;
      }
      if (!__any_sync(~0u, above)) return false;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        highest[r] = quad_max(highest[r]);
        rows.move(r, highest[r] > rows.row_max[r] + kRoom ? highest[r] : rows.row_max[r]);
        rows.row_sum[r] *= rows.shrink[r];
      }
      return true;
    };
    // Scores become weights
    auto weigh = [&] {
      float shift[2];
#pragma unroll
      for (int r = 0; r < 2; ++r)
        shift[r] = rows.row_max[r] == -INFINITY ? 0 : kLift - rows.row_max[r];
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i)
        acc_s[i] = sm90::exp2_approx(fmaf(acc_s[i], size_log2, shift[i / 2 % 2]));
    };
    auto add_weights = [&] {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float sum[2] = {};
#pragma unroll
        for (int i = 2 * r; i < kKeys / 2; i += 4) sum[i / 4 % 2] += acc_s[i] + acc_s[i + 1];
        rows.row_sum[r] += sum[0] + sum[1];
      }
    };
    auto shrink_values = [&] {
#pragma unroll
      for (int i = 0; i < kD / 2; ++i) acc_o[i] *= rows.shrink[i / 2 % 2];
    };
    // Sums of the last key tiles join those of before
    auto settle = [&] {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const bool same = settled_max[r] == rows.row_max[r];
        const float shrink = same ? 1 : sm90::exp2_approx(settled_max[r] - rows.row_max[r]);
        settled_max[r] = rows.row_max[r];
#pragma unroll
        for (int i = 2 * r; i < kD / 2; i += 4) {
          settled[i] = fmaf(settled[i], shrink, acc_o[i]);
          settled[i + 1] = fmaf(settled[i + 1], shrink, acc_o[i + 1]);
          acc_o[i] = acc_o[i + 1] = 0;
        }
      }
    };
    auto step = [&](int j, bool masked) {
      const Turn<kStages> k(used + j), v(used + j - 1);
      smem.k_full[k.stage].wait(k.parity);
      await_turn();
      issue_scores(k.stage, q.stage);
      smem.v_full[v.stage].wait(v.parity);
      issue_values(v.stage);
      pass_turn();
      wgmma_wait<1>(acc_s);
      release(smem.k_empty[k.stage]);
      const bool moved = raise(j, masked);
      weigh();
      // in one place, as all warps of a warpgroup have to wait at the same
      wgmma_wait<0>(acc_o);
      if (moved) shrink_values();
      release(smem.v_empty[v.stage]);
      add_weights();
      pack_weights();
      if (j % Shape::kSettled == 0) settle();
    };

    const Turn<kStages> k(used);
    smem.k_full[k.stage].wait(k.parity);
    issue_scores(k.stage, q.stage);
    wgmma_wait<0>(acc_s);
    release(smem.k_empty[k.stage]);
    raise(0, true);
    weigh();
    add_weights();
    pack_weights();
    // key tiles that the first row sees whole, and where the last row's window begins
    const int whole_end =
        scale_log2 < 0 ? 0 : (args.causal ? max(work.row + diagonal + 1, 0) : work.sk) / kKeys;
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
    const Turn<kStages> v(used - 1);
    smem.v_full[v.stage].wait(v.parity);
    issue_values(v.stage);
    wgmma_wait<0>(acc_o);
    release(smem.v_empty[v.stage]);
    settle();

    const int64_t lse_row =
        (static_cast<int64_t>(work.batch) * args.hq + work.head) * args.sq + work.q_begin;
    const float value_scale = args.scales.value(kv_head);
    float lse_log2[2];
    int poisoned[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const RowEnd end(rows.row_max[r] - kLift, rows.total(r),
                       args.sink ? args.sink + work.head * args.sink_stride : nullptr);
      lse_log2[r] = end.lse_log2;
      if (lane % 4 == 0 && row + 8 * r < work.sq)
        args.lse[lse_row + row + 8 * r] = end.lse_log2 * kLn2;
      const float factor = end.factor * value_scale;
      float total = 0;
#pragma unroll
      for (int i = 2 * r; i < kD / 2; i += 4) {
        // a row without keys gives zero, whatever its masked values were
        settled[i] = end.factor == 0 ? 0 : settled[i] * factor;
        settled[i + 1] = end.factor == 0 ? 0 : settled[i + 1] * factor;
        total += settled[i] + settled[i + 1];
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
    auto& out = smem.out[own];
#pragma unroll
    for (int i = 0; i < kD / 2; i += 8)
      stmatrix_x4(out.address(warp * 16 + lane % 16, i * 2 + lane / 16 * 8),
                  pack_out(settled[i], settled[i + 1]), pack_out(settled[i + 2], settled[i + 3]),
                  pack_out(settled[i + 4], settled[i + 5]),
                  pack_out(settled[i + 6], settled[i + 7]));
    if (__any_sync(~0u, poisoned[0] | poisoned[1])) {
      const auto at = [&](const uint16_t* x, const Strides& strides, int head, int64_t begin) {
        return reinterpret_cast<const uint8_t*>(x) + work.batch * strides.batch +
               head * strides.head + begin * strides.row;
      };
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
          store_16_bits(out.address(warp * 16 + i, 32 * c + lane / 8 * 8) + lane % 8 * 2,
                        static_cast<uint16_t>(pack_out(values[c] * value_scale, 0)));
      }
    }
    // every writer fences before a copy reads this
    fence_async_smem();
    named_barrier_sync(8 + own, 128);
    const int first_row = work.row + own * 64;
    // the rows behind the last one may be those of another sequence
    if (args.cu_seqlens_q && first_row + 64 > work.sq) {
      uint16_t* gmem = args.out + work.head * args.out_strides.head;
      for (int i = thread; i < 64 * kD / 8; i += 128) {
        const int r = i / (kD / 8), column = i % (kD / 8) * 8;
        if (first_row + r < work.sq && column < args.dv)
          copy_16_bytes(gmem + (work.q_begin + first_row + r) * args.out_strides.row + column,
                        out.address(r, column));
      }
    } else if (thread == 0) {
      for (int column = 0; column < kD; column += 64)
        copy_to_gmem(gmem_out, out.panel(column), column, work.q_begin + first_row, work.head,
                     work.batch);
      commit_copies();
    }
  }
  // shared memory must outlive the copies that read it
  if (thread == 0) wait_copies_read<0>();
}

}  // namespace

template <int kD> void launch_float8_sm90(const ForwardCall& call, cudaStream_t stream) {
  using Shape = Float8Tile<kD>;
  Float8Args args{forward_args(call, Shape::kQueries)};
  args.scales = call.scales;
  args.half = call.out_dtype == DType::kF16;
  args.turned = call.turned;
  args.key_tiles = static_cast<int>(turned_tiles(call, kD));
  const int64_t turned = call.b * call.hk * args.key_tiles;
  launch<float8_turn_kernel<kD>>({static_cast<int>(turned), kD, 0, stream}, args);
  const auto map = [&](const void* data, int64_t d, int64_t s, int64_t h, const Strides& strides,
                       int rows) {
    return make_tensor_map(
        DType::kE4M3, data,
        {d / 2, s, h, call.b, strides.row / 2, strides.head / 2, strides.batch / 2}, rows);
  };
  const Strides& out = call.out_strides;
  launch<float8_sm90_kernel<kD>>(
      {std::min(args.tiles, call.processors), Shape::kThreads,
       sm90::shared_memory_bytes<Float8Smem<kD>>(), stream, true},
      map(call.q, call.d, call.sq, call.hq, call.q_strides, Shape::kQueries),
      map(call.k, call.d, call.sk, call.hk, call.k_strides, Shape::kKeys),
      make_tensor_map(DType::kE4M3, call.turned, {64, kD, turned, 1, 64, 64 * kD, 64 * kD}, kD),
      make_tensor_map(call.out_dtype, call.out,
                      {call.dv, call.sq, call.hq, call.b, out.row, out.head, out.batch}, 64),
      args);
}

}  // namespace heddle
