#include "core/registry.h"
#include "lightning/scan_portable.cuh"

// S = lambda S + k^T v and o = scale q S for a few tokens, on states that are read and written
// once: 8 d e bytes each, which is all that takes time. A CTA owns 64 columns of v in one state,
// and each of its 256 threads up to 16 pieces of four numbers, which stay in registers from the
// first token to the last. All reads are on their way before the first is used.
namespace heddle {
namespace {

constexpr int kSlab = 64, kDecodeThreads = 256, kMostSize = 256;
constexpr int kAcross = kSlab / 4, kDown = kDecodeThreads / kAcross;  // threads along a row, rows

struct DecodeArgs {
  Strided q, k, v;
  const float* slopes;
  int64_t slopes_stride;
  float* states;
  const int32_t* slots;
  int64_t slots_stride, batch, pool;
  void* out;
  float* all_states;
  int heads_q, heads_k, heads_v, heads, heads_state, tokens, d, e, slabs;
  float scale;
  bool vectors;  // pieces are aligned to 16 bytes
  int* fault;
};

// kPieces cover d: 16 times as many rows of a state that is [d, e], and if it is [e, d] 64 columns
// for every four
// with 8 pieces, 128 KB are on their way to a multiprocessor, which a few spilled registers are
// worth
template <class T, int kPieces, bool kTransposed>
__global__ void __launch_bounds__(kDecodeThreads, kPieces == 8 ? 4 : 1)
    lightning_decode_kernel(DecodeArgs p) {
  __shared__ float smem_q[kMostSize], smem_k[kMostSize], smem_v[kMostSize];
  __shared__ float4 smem_sum[kDecodeThreads / 32][kAcross];
  constexpr int kAlong = kTransposed ? kPieces / 4 : 1;  // pieces of a thread in one row
  const int64_t index = blockIdx.x / p.slabs, b = index / p.heads_state;
  const int state_head = index % p.heads_state, group = p.heads / p.heads_state;
  const int slab = blockIdx.x % p.slabs * kSlab, thread = threadIdx.x;
  const int lane = thread % kAcross, line = thread / kAcross;
  const int64_t slot = p.slots[b * p.slots_stride], size = static_cast<int64_t>(p.d) * p.e;
  const float slope = p.slopes[state_head * p.slopes_stride];
  if (blockIdx.x == 0) {  // looks at everything, so that nobody has to clear the word before
    bool bad = false;
    for (int64_t i = thread; i < p.batch; i += kDecodeThreads)
      bad |= p.slots[i * p.slots_stride] >= p.pool;
    for (int i = thread; i < p.heads_state; i += kDecodeThreads)
      bad |= bad_slope(p.slopes[i * p.slopes_stride]);
    bad = __syncthreads_or(bad);
    if (thread == 0) *p.fault = bad;
  }
  const bool skipped = slot < 0 || slot >= p.pool;
  const float decay = expf(-slope);
  const int rows = kTransposed ? p.e : p.d, columns = kTransposed ? p.d : p.e;
  const auto row_of = [&](int i) { return line + i / kAlong * kDown + (kTransposed ? slab : 0); };
  const auto column_of = [&](int i) {
    return 4 * lane + (kTransposed ? i % kAlong * kSlab : slab);
  };

  float acc[kPieces][4] = {};
  // body(piece, how many of its numbers exist, where they stand)
  const auto each = [&](const auto& body) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int row = row_of(i), column = column_of(i);
      if (row < rows && column < columns)
        body(acc[i], min(columns - column, 4), row * columns + column);
    }
  };
  // the choice between both is no part of a piece, so that all reads of vectors follow each other
  const auto store = [&](float* to) {
    if (p.vectors)
      each([&](const float(&piece)[4], int, int at) {
        *reinterpret_cast<float4*>(to + at) = float4{piece[0], piece[1], piece[2], piece[3]};
      });
    else
      each([&](const float(&piece)[4], int count, int at) {
        for (int j = 0; j < 4; ++j)
          if (j < count) to[at + j] = piece[j];
      });
  };
  float* const state = p.states + ((skipped ? 0 : slot) * p.heads_state + state_head) * size;
  if (!skipped && p.vectors)
    each([&](float(&piece)[4], int, int at) {
      const float4 x = *reinterpret_cast<const float4*>(state + at);
      piece[0] = x.x, piece[1] = x.y, piece[2] = x.z, piece[3] = x.w;
    });
  else if (!skipped)
    each([&](float(&piece)[4], int count, int at) {
      for (int j = 0; j < 4; ++j)
        if (j < count) piece[j] = state[at + j];
    });

  for (int t = 0; t < p.tokens; ++t)
    for (int member = 0; member < group; ++member) {
      const int head = state_head * group + member;
      // a value for every thread, zeros behind the last: what a piece has there stays zero
      const auto load = [&](const Strided& x, int heads, int count) {
        return thread < count ? head_row<T>(x, b, t, head / (p.heads / heads), thread) : 0;
      };
      const float q = load(p.q, p.heads_q, p.d), k = load(p.k, p.heads_k, p.d);
      const float v = load(p.v, p.heads_v, p.e);
      __syncthreads();
      smem_q[thread] = q;
      smem_k[thread] = k;
      smem_v[thread] = skipped ? 0 : v;
      __syncthreads();
      if (member == 0) {
        const float *by_row = kTransposed ? smem_v : smem_k,
                    *by_column = kTransposed ? smem_k : smem_v;
#pragma unroll
        for (int i = 0; i < kPieces; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            acc[i][j] = fmaf(decay, acc[i][j], by_row[row_of(i)] * by_column[column_of(i) + j]);
        if (p.all_states)
          store(p.all_states + ((b * p.tokens + t) * p.heads_state + state_head) * size);
      }
      T* const out = static_cast<T*>(p.out) + ((b * p.tokens + t) * p.heads + head) * p.e;
      const auto write = [&](int f, float sum) {
        if (f < p.e) out[f] = from_float<T>(skipped ? 0 : p.scale * sum);
      };
      if constexpr (kTransposed) {
#pragma unroll
        for (int i = 0; i < kPieces; i += kAlong) {
          float sum = 0;
#pragma unroll
          for (int along = i; along < i + kAlong; ++along)
#pragma unroll
            for (int j = 0; j < 4; ++j)
              sum = fmaf(smem_q[column_of(along) + j], acc[along][j], sum);
#pragma unroll
          for (int mask = kAcross / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
          if (lane == 0) write(row_of(i), sum);
        }
      } else {
        float sums[4] = {};
#pragma unroll
        for (int i = 0; i < kPieces; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[j] = fmaf(smem_q[row_of(i)], acc[i][j], sums[j]);
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[j] += __shfl_xor_sync(~0u, sums[j], kAcross);
        if (thread % 32 < kAcross)
          smem_sum[thread / 32][lane] = float4{sums[0], sums[1], sums[2], sums[3]};
        __syncthreads();
        if (thread < kSlab) {
          float sum = 0;
          for (int warp = 0; warp < kDecodeThreads / 32; ++warp)
            sum += reinterpret_cast<const float*>(smem_sum[warp])[thread];
          write(slab + thread, sum);
        }
      }
    }
  if (!skipped) store(state);
}

void run(const LightningDecode& op, CudaContext& context) {
  const LightningHeads heads(op.q, op.k, op.v, op.slopes);
  const auto small = [](int64_t x) { return static_cast<int>(x); };
  DecodeArgs args{Strided(op.q), Strided(op.k), Strided(op.v)};
  args.slopes = op.slopes.as<float>();
  args.slopes_stride = op.slopes.strides[0];
  args.states = op.states.as<float>();
  args.slots = op.slots.as<int32_t>();
  args.slots_stride = op.slots.strides[0];
  args.batch = op.q.shape[0];
  args.pool = op.states.shape[0];
  args.out = op.out.data;
  args.all_states = op.all_states ? op.all_states.as<float>() : nullptr;
  args.heads_q = small(heads.q);
  args.heads_k = small(heads.k);
  args.heads_v = small(heads.v);
  args.heads = small(heads.out);
  args.heads_state = small(heads.states);
  args.tokens = small(op.q.shape[1]);
  args.d = small(op.q.shape[3]);
  args.e = small(op.v.shape[3]);
  args.slabs = (args.e + kSlab - 1) / kSlab;
  args.scale = static_cast<float>(op.scale);
  args.vectors = op.states.shape[3] % 4 == 0 && reinterpret_cast<uintptr_t>(args.states) % 16 == 0;
  const int64_t tasks = op.q.shape[0] * heads.states * args.slabs;
  if (tasks == 0 || args.tokens == 0) return;
  HEDDLE_CHECK(tasks < INT32_MAX, kUnsupported, "q", "q has too many rows for one call");
  args.fault =
      context.verdict("slots must be below the size of the pool, and slopes finite and at least 0");
  dispatch_float(op.q.dtype, [&]<class T>(T) {
    const bool transposed = op.state_layout == 1, few = args.d <= 8 * kDown;
    auto* kernel = transposed ? few ? lightning_decode_kernel<T, 8, true>
                                    : lightning_decode_kernel<T, 16, true>
                   : few ? lightning_decode_kernel<T, 8, false>
                              : lightning_decode_kernel<T, 16, false>;
    kernel<<<static_cast<unsigned>(tasks), kDecodeThreads, 0, context.stream>>>(args);
  });
  context.launched("lightning_decode_kernel");
}

HEDDLE_REGISTER(LightningDecode);

}  // namespace
}  // namespace heddle
