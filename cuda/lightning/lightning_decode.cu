#include "common/variants.h"
#include "core/slot.h"
#include "lightning/decode_sm90.h"
#include "lightning/decode_tile.cuh"
#include "lightning/scan_portable.cuh"

// S = lambda S + k^T v and o = scale q S for a few tokens, on states that are read and written
// once: 8 d e bytes each, which is all that takes time.
namespace heddle {
namespace {

constexpr int kMostSize = 256;

// A CTA owns one tile of a state, which stays in registers from the first token to the last. All
// reads are on their way before the first is used: with 8 pieces 128 KB to a multiprocessor, which
// a few spilled registers are worth.
template <class T, int kPieces, bool kTransposed>
__global__ void __launch_bounds__(kDecodeThreads, kPieces == 8 ? 4 : 1)
    lightning_decode_kernel(DecodeCall p) {
  using Tile = DecodeTile<kPieces, kTransposed>;
  __shared__ float smem_q[kMostSize], smem_k[kMostSize], smem_v[kMostSize];
  __shared__ typename Tile::Sums smem_sums;
  const int slabs = (p.e + kDecodeSlab - 1) / kDecodeSlab;
  const int64_t index = blockIdx.x / slabs, b = index / p.heads_state;
  const int state_head = index % p.heads_state, group = p.heads / p.heads_state;
  const int thread = threadIdx.x;
  const int64_t slot = p.slots[b * p.slots_stride];
  const float slope = p.slopes[state_head * p.slopes_stride];
  if (blockIdx.x == 0) {
    const bool bad = __syncthreads_or(p.finds_bad(thread, kDecodeThreads));
    if (thread == 0) *p.fault = bad;
  }
  const bool skipped = slot < 0 || slot >= p.pool;
  const float decay = expf(-slope);
  Tile tile(p.d, p.e, blockIdx.x % slabs * kDecodeSlab, thread);
  // the choice between both is no part of a piece, so that all reads of vectors follow each other
  const auto store = [&](float* to) {
    if (p.vectors)
      tile.store_vectors(to);
    else
      tile.each([&](const float(&piece)[4], int count, int at) {
        for (int j = 0; j < 4; ++j)
          if (j < count) to[at + j] = piece[j];
      });
  };
  float* const state =
      p.states + ((skipped ? 0 : slot) * p.heads_state + state_head) * p.state_size();
  if (!skipped && p.vectors)
    tile.load_vectors(state);
  else if (!skipped)
    tile.each([&](float(&piece)[4], int count, int at) {
      for (int j = 0; j < 4; ++j)
        if (j < count) piece[j] = state[at + j];
    });

  for (int t = 0; t < p.tokens; ++t)
    for (int member = 0; member < group; ++member) {
      const int head = state_head * group + member;
      // a value for every thread, zeros behind the last
      const auto load = [&](const DecodeRows& x, int heads, int count) {
        return thread < count ? to_float(static_cast<const T*>(
                                    x.data)[x.offset(b, t, head / (p.heads / heads), thread)])
                              : 0;
      };
      const float q = load(p.q, p.heads_q, p.d), k = load(p.k, p.heads_k, p.d);
      const float v = load(p.v, p.heads_v, p.e);
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

DecodeCall call_of(const LightningDecode& op, const CudaContext& context) {
  const LightningHeads heads(op.q, op.k, op.v, op.slopes);
  const auto small = [](int64_t x) { return static_cast<int>(x); };
  const auto rows = [](const Tensor& x) {
    return DecodeRows{x.data, {x.strides[0], x.strides[1], x.strides[2], x.strides[3]}};
  };
  DecodeCall call{};
  call.dtype = op.q.dtype;
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
  call.heads_q = small(heads.q);
  call.heads_k = small(heads.k);
  call.heads_v = small(heads.v);
  call.heads = small(heads.out);
  call.heads_state = small(heads.states);
  call.tokens = small(op.q.shape[1]);
  call.d = small(op.q.shape[3]);
  call.e = small(op.v.shape[3]);
  call.scale = static_cast<float>(op.scale);
  call.transposed = op.state_layout == 1;
  call.vectors = op.states.shape[3] % 4 == 0 && reinterpret_cast<uintptr_t>(call.states) % 16 == 0;
  call.processors = context.processors;
  return call;
}

const char* declines_hopper(const LightningDecode& op, const CudaContext& context) {
  if (context.arch != 90) return "it needs sm_90";
  return declines_decode_sm90(call_of(op, context));
}

constexpr const char* kFault =
    "slots must be below the size of the pool, and slopes finite and at least 0";

void run_hopper(const LightningDecode& op, CudaContext& context) {
  DecodeCall call = call_of(op, context);
  call.fault = context.verdict(kFault);
  decode_sm90(call, context.stream);
  context.launched("lightning_decode_sm90_kernel");
}

const char* declines_portable(const LightningDecode&, const CudaContext&) { return nullptr; }

void run_portable(const LightningDecode& op, CudaContext& context) {
  DecodeCall call = call_of(op, context);
  const int64_t ctas = call.batch * call.heads_state * ((call.e + kDecodeSlab - 1) / kDecodeSlab);
  HEDDLE_CHECK(ctas < INT32_MAX, kUnsupported, "q", "q has too many rows for one call");
  call.fault = context.verdict(kFault);
  dispatch_float(op.q.dtype, [&]<class T>(T) {
    const bool few = call.d <= 128;
    auto* kernel = call.transposed ? few ? lightning_decode_kernel<T, 8, true>
                                         : lightning_decode_kernel<T, 16, true>
                   : few ? lightning_decode_kernel<T, 8, false>
                                   : lightning_decode_kernel<T, 16, false>;
    kernel<<<static_cast<unsigned>(ctas), kDecodeThreads, 0, context.stream>>>(call);
  });
  context.launched("lightning_decode_kernel");
}

constexpr Variant<LightningDecode> kVariants[] = {
    {"sm90_bulk", declines_hopper, run_hopper},
    {"sm80_simt", declines_portable, run_portable},
};

void run(const LightningDecode& op, CudaContext& context) {
  if (op.out.size() > 0) run_variants(kVariants, op, context);
}

HEDDLE_REGISTER(LightningDecode);
HEDDLE_EXPLAIN(LightningDecode, kVariants);

}  // namespace
}  // namespace heddle
