#include "common/variants.h"
#include "core/slot.h"
#include "lightning/bad_slope.cuh"
#include "lightning/scan_portable.cuh"

// S = lambda S + k^T v and o = scale q S for a few tokens, on states that are read and written
// once: 8 d e bytes each, which is all that takes time.
namespace heddle {
namespace {

constexpr int kDecodeSlab = 64, kDecodeThreads = 256;  // columns of v in a tile, its threads

// Rows of q, k or v: [b, s, heads, d or e]
struct DecodeRows {
  const void* data;
  int64_t strides[4];
  int share;  // heads of out that read the same

  // Of a head of out
  __device__ int64_t offset(int64_t b, int64_t token, int head, int64_t i) const {
    return b * strides[0] + token * strides[1] + head / share * strides[2] + i * strides[3];
  }
};

struct DecodeCall {
  DecodeRows q, k, v;
  const float* slopes;
  int64_t slopes_stride;
  float* states;
  const int32_t* slots;
  int64_t slots_stride, batch, pool;
  void* out;
  float* all_states;
  int heads, heads_state, tokens, d, e;
  float scale;
  bool transposed;  // states are [e, d]
  bool vectors;     // rows of a state are aligned to 16 bytes
  int* fault;

  __device__ int64_t state_size() const { return static_cast<int64_t>(d) * e; }
  // Whether this thread finds a slot or a slope that is none. Threads together look at everything,
  // so that nobody has to clear the word before.
  __device__ bool finds_bad(int thread, int threads) const {
    bool bad = false;
    for (int64_t i = thread; i < batch; i += threads) bad |= slots[i * slots_stride] >= pool;
    for (int i = thread; i < heads_state; i += threads) bad |= bad_slope(slopes[i * slopes_stride]);
    return bad;
  }
};

// What 256 threads hold of a state: 64 columns of v, each thread up to kPieces pieces of four
// numbers along a row. kPieces cover d: 16 times as many rows of a state that is [d, e], and if it
// is [e, d] 64 columns for every four. Numbers behind d and e are zero and stay so.
template <int kPieces, bool kTransposed> struct DecodeTile {
  static constexpr int kAcross = kDecodeSlab / 4,
                       kDown = kDecodeThreads / kAcross;        // threads along a row, rows
  static constexpr int kAlong = kTransposed ? kPieces / 4 : 1;  // pieces of a thread in one row
  using Sums = float4[kDecodeThreads / 32][kAcross];

  int rows, columns, thread, lane, line, slab;
  float acc[kPieces][4] = {};

  __device__ __forceinline__ DecodeTile(int d, int e, int slab, int thread)
      : rows(kTransposed ? e : d),
        columns(kTransposed ? d : e),
        thread(thread),
        lane(thread % kAcross),
        line(thread / kAcross),
        slab(slab) {}

  __device__ __forceinline__ int row_of(int i) const {
    return line + i / kAlong * kDown + (kTransposed ? slab : 0);
  }
  __device__ __forceinline__ int column_of(int i) const {
    return 4 * lane + (kTransposed ? i % kAlong * kDecodeSlab : slab);
  }

  // body(piece, how many of its numbers exist, where they stand)
  template <class Body> __device__ __forceinline__ void each(const Body& body) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int row = row_of(i), column = column_of(i);
      if (row < rows && column < columns)
        body(acc[i], min(columns - column, 4), row * columns + column);
    }
  }
  // With rows that are aligned to 16 bytes. L2 lets go of states before anything else: kept as
  // usual they are written back in an order that takes memory twice the time.
  __device__ __forceinline__ void load_vectors(const float* state) {
    each([&](float(&piece)[4], int, int at) {
      const float4 x = __ldcs(reinterpret_cast<const float4*>(state + at));
      piece[0] = x.x, piece[1] = x.y, piece[2] = x.z, piece[3] = x.w;
    });
  }
  __device__ __forceinline__ void store_vectors(float* state) {
    each([&](const float(&piece)[4], int, int at) {
      __stcs(reinterpret_cast<float4*>(state + at), {piece[0], piece[1], piece[2], piece[3]});
    });
  }

  // S = decay S + k^T v
  __device__ __forceinline__ void advance(float decay, const float* smem_k, const float* smem_v) {
    const float *by_row = kTransposed ? smem_v : smem_k, *by_column = kTransposed ? smem_k : smem_v;
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        acc[i][j] = fmaf(decay, acc[i][j], by_row[row_of(i)] * by_column[column_of(i) + j]);
  }

  // write(f, q S[.., f]) on one thread for each f of the slab; `meet` joins all that share `sums`
  template <class Meet, class Write>
  __device__ __forceinline__ void project(const float* smem_q, Sums& sums, const Meet& meet,
                                          const Write& write) const {
    if constexpr (kTransposed) {
#pragma unroll
      for (int i = 0; i < kPieces; i += kAlong) {
        float sum = 0;
#pragma unroll
        for (int along = i; along < i + kAlong; ++along)
#pragma unroll
          for (int j = 0; j < 4; ++j) sum = fmaf(smem_q[column_of(along) + j], acc[along][j], sum);
#pragma unroll
        for (int mask = kAcross / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
        if (lane == 0) write(row_of(i), sum);
      }
    } else {
      float own[4] = {};
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) own[j] = fmaf(smem_q[row_of(i)], acc[i][j], own[j]);
#pragma unroll
      for (int j = 0; j < 4; ++j) own[j] += __shfl_xor_sync(~0u, own[j], kAcross);
      if (thread % 32 < kAcross) sums[thread / 32][lane] = float4{own[0], own[1], own[2], own[3]};
      meet();
      if (thread < kDecodeSlab) {
        float sum = 0;
        for (int warp = 0; warp < kDecodeThreads / 32; ++warp)
          sum += reinterpret_cast<const float*>(sums[warp])[thread];
        write(slab + thread, sum);
      }
    }
  }
};

// A CTA owns one tile of a state, which stays in registers from the first token to the last. All
// reads are on their way before the first is used: with 8 pieces 128 KB to a multiprocessor. What
// registers do not hold passes through L2 as states do, so nothing may spill.
template <class T, int kPieces, bool kTransposed, bool kVectors>
__global__ void __launch_bounds__(kDecodeThreads, kPieces == 8 ? 4 : 2)
    lightning_decode_kernel(DecodeCall p) {
  using Tile = DecodeTile<kPieces, kTransposed>;
  __shared__ float smem_q[kDecodeThreads], smem_k[kDecodeThreads], smem_v[kDecodeThreads];
  __shared__ typename Tile::Sums smem_sums;
  const int slabs = (p.e + kDecodeSlab - 1) / kDecodeSlab;
  const int index = blockIdx.x / slabs, state_head = index % p.heads_state;
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
      tile.each([&](const float(&piece)[4], int count, int at) {
        for (int j = 0; j < 4; ++j)
          if (j < count) to[at + j] = piece[j];
      });
  };
  float* const state =
      p.states + ((skipped ? 0 : slot) * p.heads_state + state_head) * p.state_size();
  if (!skipped && kVectors)
    tile.load_vectors(state);
  else if (!skipped)
    tile.each([&](float(&piece)[4], int count, int at) {
      for (int j = 0; j < 4; ++j)
        if (j < count) piece[j] = state[at + j];
    });
  if (blockIdx.x == 0) {  // while the state is on its way
    const bool bad = __syncthreads_or(p.finds_bad(thread, kDecodeThreads));
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
          store(p.all_states + ((b * p.tokens + t) * p.heads_state + state_head) * p.state_size());
      }
      T* const out = static_cast<T*>(p.out) + ((b * p.tokens + t) * p.heads + head) * p.e;
      tile.project(
          smem_q, smem_sums, [] { __syncthreads(); },
          [&](int f, float sum) {
            if (f < p.e) out[f] = from_float<T>(skipped ? 0 : p.scale * sum);
          });
    }
  if (!skipped) store(state);
}

DecodeCall call_of(const LightningDecode& op) {
  const LightningHeads heads(op.q, op.k, op.v, op.slopes);
  const auto small = [](int64_t x) { return static_cast<int>(x); };
  const auto rows = [&](const Tensor& x) {
    return DecodeRows{x.data,
                      {x.strides[0], x.strides[1], x.strides[2], x.strides[3]},
                      small(heads.out / x.shape[2])};
  };
  DecodeCall call{};
  call.q = rows(op.q);
  call.k = rows(op.k);
  call.v = rows(op.v);
  call.slopes = op.slopes.as<float>();
  call.slopes_stride = op.slopes.strides[0];
  call.states = op.states.as<float>();
  call.slots = op.slots.as<int32_t>();
  call.slots_stride = op.slots.strides[0];
  call.batch = op.q.shape[0];
  call.pool = op.states.shape[0];
  call.out = op.out.data;
  call.all_states = op.all_states ? op.all_states.as<float>() : nullptr;
  call.heads = small(heads.out);
  call.heads_state = small(heads.states);
  call.tokens = small(op.q.shape[1]);
  call.d = small(op.q.shape[3]);
  call.e = small(op.v.shape[3]);
  call.scale = static_cast<float>(op.scale);
  call.transposed = op.state_layout == 1;
  call.vectors = op.states.shape[3] % 4 == 0 && reinterpret_cast<uintptr_t>(call.states) % 16 == 0;
  return call;
}

constexpr const char* kFault =
    "slots must be below the size of the pool, and slopes finite and at least 0";

const char* declines_portable(const LightningDecode&, const CudaContext&) { return nullptr; }

void run_portable(const LightningDecode& op, CudaContext& context) {
  DecodeCall call = call_of(op);
  const int64_t ctas = call.batch * call.heads_state * ((call.e + kDecodeSlab - 1) / kDecodeSlab);
  HEDDLE_CHECK(ctas < INT32_MAX, kUnsupported, "q", "q has too many rows for one call");
  call.fault = context.verdict(kFault);
  dispatch_float(op.q.dtype, [&]<class T>(T) {
    const auto pick = [&]<int kPieces, bool kVectors>() {
      return call.transposed ? lightning_decode_kernel<T, kPieces, true, kVectors>
                             : lightning_decode_kernel<T, kPieces, false, kVectors>;
    };
    auto* kernel = !call.vectors   ? pick.template operator()<16, false>()
                   : call.d <= 128 ? pick.template operator()<8, true>()
                                   : pick.template operator()<16, true>();
    kernel<<<static_cast<unsigned>(ctas), kDecodeThreads, 0, context.stream>>>(call);
  });
  context.launched("lightning_decode_kernel");
}

constexpr Variant<LightningDecode> kVariants[] = {
    {"sm80_simt", declines_portable, run_portable},
};

void run(const LightningDecode& op, CudaContext& context) {
  if (op.out.size() > 0) run_variants(kVariants, op, context);
}

HEDDLE_REGISTER(LightningDecode);
HEDDLE_EXPLAIN(LightningDecode, kVariants);

}  // namespace
}  // namespace heddle
