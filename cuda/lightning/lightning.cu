#include "ops/lightning.h"

#include "common/variants.h"
#include "core/registry.h"
#include "lightning/scan_call.h"
#include "lightning/scan_portable.cuh"

namespace heddle {
namespace {

ScanCall hopper_call(const Lightning& op, const CudaContext& context) {
  ScanCall call = scan_call(op, context);
  call.out = op.out.data;
  set_initial_state(call, op.initial_state);
  call.state = op.state ? op.state.as<float>() : nullptr;
  return call;
}

const char* declines_hopper(const Lightning& op, const CudaContext& context) {
  if (const char* reason = declines_scan_options(op, context)) return reason;
  return declines_scan_sm90(hopper_call(op, context));
}

void run_hopper(const Lightning& op, CudaContext& context) {
  ScanCall call = hopper_call(op, context);
  const ScanPlan plan = plan_scan_sm90(call);
  if (plan.summed > 0)
    call.summaries = context.scratch<float>(static_cast<size_t>(plan.summary_size(call)));
  call.fault = context.fault(scan_fault_text(op.cu_seqlens));
  scan_sm90(call, plan, context.stream);
  context.launched("lightning_sm90_kernel");
}

const char* declines_portable(const Lightning&, const CudaContext&) { return nullptr; }

void run_portable(const Lightning& op, CudaContext& context) {
  PortableArgs args = portable_args(op, context.fault(scan_fault_text(op.cu_seqlens)));
  if (op.initial_state) args.initial_state = Strided(op.initial_state);
  args.has_initial = bool(op.initial_state);
  args.out = op.out.data;
  args.state = op.state ? op.state.as<float>() : nullptr;
  dispatch_float(op.q.dtype, [&]<class T>(T) { launch_scan<T, T, false>(args, context); });
}

constexpr Variant<Lightning> kVariants[] = {
    {"sm90_wgmma", declines_hopper, run_hopper},
    {"sm80_simt", declines_portable, run_portable},
};

void run(const Lightning& op, CudaContext& context) {
  if (op.out.size() > 0 || op.state) run_variants(kVariants, op, context);
}

struct DecodeArgs {
  Strided q, k, v;
  const float* slopes;
  int64_t slopes_stride;
  float* states;
  const int32_t* slots;
  int64_t slots_stride, pool;
  void* out;
  float* all_states;
  int heads_q, heads_k, heads_v, heads, heads_state, tokens, d, e;
  float scale;
  bool transposed;  // states are [e, d]
  int* fault;
};

// A CTA owns one state; each thread keeps to its own columns of it, so that no thread waits for
// another but at the queries
template <class T> __global__ void lightning_decode_kernel(DecodeArgs p) {
  __shared__ float smem_q[256], smem_k[256];
  const int64_t b = blockIdx.x / p.heads_state;
  const int state_head = blockIdx.x % p.heads_state, group = p.heads / p.heads_state;
  const int64_t slot = p.slots[b * p.slots_stride], size = static_cast<int64_t>(p.d) * p.e;
  const float slope = p.slopes[state_head * p.slopes_stride];
  if ((slot >= p.pool || bad_slope(slope)) && threadIdx.x == 0) *p.fault = 1;
  const bool skipped = slot < 0 || slot >= p.pool;
  const float decay = expf(-slope);
  float* state = p.states + ((skipped ? 0 : slot) * p.heads_state + state_head) * size;
  const int row = p.transposed ? 1 : p.e,
            step = p.transposed ? p.d : 1;  // from one i to the next, and from one f
  for (int t = 0; t < p.tokens; ++t) {
    float* snapshot = p.all_states
                          ? p.all_states + ((b * p.tokens + t) * p.heads_state + state_head) * size
                          : nullptr;
    for (int member = 0; member < group; ++member) {
      const int head = state_head * group + member;
      __syncthreads();
      for (int i = threadIdx.x; i < p.d; i += blockDim.x) {
        smem_q[i] = head_row<T>(p.q, b, t, head / (p.heads / p.heads_q), i);
        smem_k[i] = head_row<T>(p.k, b, t, head / (p.heads / p.heads_k), i);
      }
      __syncthreads();
      for (int f = threadIdx.x; f < p.e; f += blockDim.x) {
        const float value = head_row<T>(p.v, b, t, head / (p.heads / p.heads_v), f);
        float sum = 0;
        for (int i = 0; i < p.d && !skipped; ++i) {
          float& cell = state[i * row + f * step];
          if (member == 0) cell = fmaf(decay, cell, smem_k[i] * value);
          sum = fmaf(smem_q[i], cell, sum);
        }
        static_cast<T*>(p.out)[((b * p.tokens + t) * p.heads + head) * p.e + f] =
            from_float<T>(p.scale * sum);
        if (snapshot && member == 0)
          for (int i = 0; i < p.d; ++i)
            snapshot[i * row + f * step] = skipped ? 0 : state[i * row + f * step];
      }
    }
  }
}

void run(const LightningDecode& op, CudaContext& context) {
  const LightningHeads heads(op.q, op.k, op.v, op.slopes);
  const auto small = [](int64_t x) { return static_cast<int>(x); };
  const DecodeArgs args{
      Strided(op.q),
      Strided(op.k),
      Strided(op.v),
      op.slopes.as<float>(),
      op.slopes.strides[0],
      op.states.as<float>(),
      op.slots.as<int32_t>(),
      op.slots.strides[0],
      op.states.shape[0],
      op.out.data,
      op.all_states ? op.all_states.as<float>() : nullptr,
      small(heads.q),
      small(heads.k),
      small(heads.v),
      small(heads.out),
      small(heads.states),
      small(op.q.shape[1]),
      small(op.q.shape[3]),
      small(op.v.shape[3]),
      static_cast<float>(op.scale),
      op.state_layout == 1,
      context.fault("slots must be below the size of the pool, and slopes finite and at least 0")};
  const int64_t tasks = op.q.shape[0] * heads.states;
  if (tasks == 0 || args.tokens == 0) return;
  HEDDLE_CHECK(tasks < INT32_MAX, kUnsupported, "q", "q has too many rows for one call");
  dispatch_float(op.q.dtype, [&]<class T>(T) {
    const int threads = std::min((args.e + 31) / 32 * 32, 256);
    lightning_decode_kernel<T><<<static_cast<unsigned>(tasks), threads, 0, context.stream>>>(args);
  });
  context.launched("lightning_decode_kernel");
}

HEDDLE_REGISTER(Lightning);
HEDDLE_EXPLAIN(Lightning, kVariants);
HEDDLE_REGISTER(LightningDecode);

}  // namespace
}  // namespace heddle
