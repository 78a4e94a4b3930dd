#include "common/variants.h"
#include "core/slot.h"
#include "lightning/backward_sm90.h"
#include "lightning/scan_call.h"
#include "lightning/scan_portable.cuh"

// In portable code every gradient is a scan of its own, over others in the roles of q, k and v:
//
//   dQ   forward with dout, V, K and the transposed state
//   dK   backward with V, dout, Q and the transposed gradient of the state
//   dV   backward with K, Q, dout and the gradient of the state
//
// Gradients of heads that are shared are summed in f32 and rounded once.
namespace heddle {
namespace {

// to[outer, head, :] = sum over the heads that share it
template <class T>
__global__ void lightning_gather_kernel(T* to, const float* from, int64_t size, int64_t inner,
                                        int share) {
  HEDDLE_EACH(index, size) {
    const int64_t row = index / inner, i = index % inner;
    float sum = 0;
    for (int member = 0; member < share; ++member) sum += from[(row * share + member) * inner + i];
    to[index] = from_float<T>(sum);
  }
}

template <class T>
void gather(const Tensor& to, const float* from, int64_t inner, int share, CudaContext& context) {
  if (to.size() == 0) return;
  lightning_gather_kernel<T><<<blocks_for(to.size(), context), kThreads, 0, context.stream>>>(
      to.as<T>(), from, to.size(), inner, share);
  context.launched("lightning_gather_kernel");
}

struct SlopeArgs {
  PortableArgs scan;     // q and k as they are called
  const float *dq, *dk;  // [b, s, heads, d]
  const float* state;    // [sequences, heads_state, e, d], the last one
  Strided dstate;
  bool has_dstate;
  double* sums;  // [sequences, heads_state]
};

// d loss / d ln lambda = sum of t q_t . dq_t - t k_t . dk_t over tokens t = 1 ... n, and
// n <S_n, dS_n>. A CTA sums up one state of one sequence.
template <class T> __global__ void lightning_slope_kernel(SlopeArgs args) {
  __shared__ double smem_sum[kThreads];
  const PortableArgs& p = args.scan;
  const int64_t sequence = blockIdx.x / p.heads_state;
  const int state_head = blockIdx.x % p.heads_state, share = p.heads / p.heads_state;
  int64_t batch = sequence, begin = 0, end = p.tokens;
  if (p.cu_seqlens) {
    // the scans have reported offsets that make no sense
    const auto at = [&](int64_t i) {
      return min(max(int64_t{p.cu_seqlens[i * p.cu_stride]}, int64_t{0}), p.tokens);
    };
    batch = 0;
    begin = at(sequence);
    end = max(at(sequence + 1), begin);
  }
  double sum = 0;
  for (int head = state_head * share; head < (state_head + 1) * share; ++head) {
    const int head_q = head / (p.heads / p.heads_q), head_k = head / (p.heads / p.heads_k);
    for (int64_t i = threadIdx.x; i < (end - begin) * p.d; i += kThreads) {
      const int64_t token = begin + i / p.d, c = i % p.d;
      const int64_t at = ((batch * p.tokens + token) * p.heads + head) * p.d + c;
      const double q = head_row<T>(p.q, batch, token, head_q, c),
                   k = head_row<T>(p.k, batch, token, head_k, c);
      sum += static_cast<double>(i / p.d + 1) * (q * args.dq[at] - k * args.dk[at]);
    }
  }
  if (args.has_dstate) {
    const float* state = args.state + static_cast<int64_t>(blockIdx.x) * p.d * p.e;
    const int64_t* strides = args.dstate.strides;
    const auto* dstate = reinterpret_cast<const float*>(args.dstate.data) + sequence * strides[0] +
                         state_head * strides[1];
    for (int i = threadIdx.x; i < p.d * p.e; i += kThreads)
      sum += static_cast<double>(end - begin) * state[i] *
             dstate[i % p.d * strides[2] + i / p.d * strides[3]];
  }
  smem_sum[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) smem_sum[threadIdx.x] += smem_sum[threadIdx.x + half];
  }
  if (threadIdx.x == 0) args.sums[blockIdx.x] = smem_sum[0];
}

__global__ void lightning_slope_sum_kernel(float* dslopes, const double* sums, int64_t sequences,
                                           int64_t states) {
  HEDDLE_EACH(state, states) {
    double sum = 0;
    for (int64_t i = 0; i < sequences; ++i) sum += sums[i * states + state];
    dslopes[state] = static_cast<float>(-sum);
  }
}

Tensor transposed(Tensor state) {
  std::swap(state.shape[2], state.shape[3]);
  std::swap(state.strides[2], state.strides[3]);
  return state;
}

template <class T> class Backward {
 public:
  Backward(const LightningBackward& op, CudaContext& context)
      : op_(op),
        context_(context),
        call_(portable_args(op, context.fault(scan_fault_text(op.cu_seqlens)))) {}

  void run() {
    const int64_t rows = op_.q.shape[0] * op_.q.shape[1] * call_.heads;
    const auto wide = [&](const Tensor& x, bool needed) {
      const bool shared = x.shape[2] != call_.heads;
      return shared || needed ? context_.scratch<float>(static_cast<size_t>(rows * x.shape[3]))
                              : nullptr;
    };
    const bool slopes = bool(op_.dslopes);
    float *const dq = wide(op_.dq, slopes), *const dk = wide(op_.dk, slopes);
    float* const dv = wide(op_.dv, false);
    const auto state_size = static_cast<size_t>(int64_t{call_.d} * call_.e * call_.sequences);

    PortableArgs pass = roles(op_.dout, op_.v, op_.k);
    start(pass, op_.initial_state, true);
    if (slopes && op_.dstate)
      pass.state = context_.scratch<float>(state_size * static_cast<size_t>(call_.heads_state));
    const float* const last_state = pass.state;
    scan<false>(pass, op_.dq, dq);

    pass = roles(op_.v, op_.dout, op_.q);
    start(pass, op_.dstate, true);
    scan<true>(pass, op_.dk, dk);

    pass = roles(op_.k, op_.q, op_.dout);
    start(pass, op_.dstate, false);
    const bool shares_state = call_.heads_state != call_.heads;
    if (op_.dinitial_state)
      pass.state = shares_state
                       ? context_.scratch<float>(state_size * static_cast<size_t>(call_.heads))
                       : op_.dinitial_state.as<float>();
    scan<true>(pass, op_.dv, dv);
    if (op_.dinitial_state && shares_state)
      gather<float>(op_.dinitial_state, pass.state, int64_t{call_.d} * call_.e,
                    call_.heads / call_.heads_state, context_);
    if (slopes) slope_gradients(dq, dk, last_state);
  }

 private:
  PortableArgs roles(const Tensor& q, const Tensor& k, const Tensor& v) const {
    const auto heads = [](const Tensor& x) { return static_cast<int>(x.shape[2]); };
    PortableArgs pass = call_;
    pass.q = Strided(q);
    pass.k = Strided(k);
    pass.v = Strided(v);
    pass.heads_q = heads(q);
    pass.heads_k = heads(k);
    pass.heads_v = heads(v);
    pass.d = static_cast<int>(q.shape[3]);
    pass.e = static_cast<int>(v.shape[3]);
    return pass;
  }

  static void start(PortableArgs& pass, const Tensor& state, bool turned) {
    pass.has_initial = bool(state);
    if (state) pass.initial_state = Strided(turned ? transposed(state) : state);
  }

  template <bool kReverse> void scan(PortableArgs& pass, const Tensor& to, float* wide) {
    pass.out = wide ? static_cast<void*>(wide) : to.data;
    wide ? launch_scan<T, float, kReverse>(pass, context_)
         : launch_scan<T, T, kReverse>(pass, context_);
    if (wide)
      gather<T>(to, wide, to.shape[3],
                to.shape[2] ? call_.heads / static_cast<int>(to.shape[2]) : 1, context_);
  }

  void slope_gradients(const float* dq, const float* dk, const float* state) {
    const int64_t states = call_.sequences * call_.heads_state;
    SlopeArgs args{call_, dq, dk, state, Strided(op_.dstate), bool(op_.dstate), nullptr};
    args.sums = context_.scratch<double>(static_cast<size_t>(states));
    if (states > 0) {
      lightning_slope_kernel<T>
          <<<static_cast<unsigned>(states), kThreads, 0, context_.stream>>>(args);
      context_.launched("lightning_slope_kernel");
    }
    if (call_.heads_state == 0) return;
    lightning_slope_sum_kernel<<<blocks_for(call_.heads_state, context_), kThreads, 0,
                                 context_.stream>>>(op_.dslopes.as<float>(), args.sums,
                                                    call_.sequences, call_.heads_state);
    context_.launched("lightning_slope_sum_kernel");
  }

  const LightningBackward& op_;
  CudaContext& context_;
  const PortableArgs call_;
};

const char* declines_portable(const LightningBackward&, const CudaContext&) { return nullptr; }

void run_portable(const LightningBackward& op, CudaContext& context) {
  dispatch_float(op.q.dtype, [&]<class T>(T) { Backward<T>(op, context).run(); });
}

SweepCall hopper_call(const LightningBackward& op, const CudaContext& context) {
  SweepCall call{scan_call(op, context)};
  call.dout = op.dout.data;
  call.dout_strides = scan_strides(op.dout);
  call.dk = op.dk.data;
  call.dv = op.dv.data;
  set_initial_state(call, op.dstate);
  call.state = op.dinitial_state ? op.dinitial_state.as<float>() : nullptr;
  return call;
}

ScanCall hopper_call_for_dq(const LightningBackward& op, const SweepCall& call) {
  return scan_for_dq(call, op.initial_state ? op.initial_state.as<float>() : nullptr,
                     op.initial_state.strides, op.dq.data);
}

const char* declines_hopper(const LightningBackward& op, const CudaContext& context) {
  if (const char* reason = declines_scan_options(op, context)) return reason;
  if (op.dout.strides[3] != 1) return "dout must be contiguous along e";
  // its sums cancel, so that they need gradients before they are rounded
  if (op.output_dslopes) return "outputDslopes must be false";
  const SweepCall call = hopper_call(op, context);
  if (const char* reason = declines_sweep_sm90(call)) return reason;
  if (const char* reason = declines_scan_sm90(hopper_call_for_dq(op, call))) return reason;
  // q is not in the other
  ScanCall forward = call;
  forward.out = op.dv.data;
  return declines_scan_sm90(forward);
}

void run_hopper(const LightningBackward& op, CudaContext& context) {
  SweepCall call = hopper_call(op, context);
  call.fault = context.fault(scan_fault_text(op.cu_seqlens));
  const auto numbers = [&](int64_t count) {
    return context.scratch<float>(static_cast<size_t>(count));
  };
  // all memory is there before the first kernel, so that nothing comes between the two sweeps
  const int64_t rows = call.b * call.s * call.heads, state_size = call.d * call.e;
  const bool shares = call.heads != call.hk, shares_state = call.state && call.heads != call.hs;
  if (shares) {
    call.dk = numbers(rows * call.d);
    call.dv = numbers(rows * call.e);
  }
  if (shares_state) call.state = numbers(call.sequences * call.heads * state_size);
  ScanCall dq = hopper_call_for_dq(op, call);
  const ScanPlan dq_plan = plan_scan_sm90(dq), plan = plan_sweep_sm90(call);
  if (dq_plan.summed > 0) dq.summaries = numbers(dq_plan.summary_size(dq));
  if (plan.summed > 0) call.summaries = numbers(plan.summary_size(call));
  scan_sm90(dq, dq_plan, context.stream);
  context.launched("lightning_sm90_kernel");
  sweep_sm90(call, plan, context.stream);
  context.launched("lightning_backward_sm90_kernel");
  const auto share = [&](int64_t of) { return static_cast<int>(call.heads / of); };
  if (shares)
    dispatch_float(call.dtype, [&]<class T>(T) {
      gather<T>(op.dk, static_cast<const float*>(call.dk), call.d, share(call.hk), context);
      gather<T>(op.dv, static_cast<const float*>(call.dv), call.e, share(call.hk), context);
    });
  if (shares_state)
    gather<float>(op.dinitial_state, call.state, state_size, share(call.hs), context);
}

constexpr Variant<LightningBackward> kVariants[] = {
    {"sm90_wgmma", declines_hopper, run_hopper},
    {"sm80_simt", declines_portable, run_portable},
};

void run(const LightningBackward& op, CudaContext& context) {
  run_variants(kVariants, op, context);
}

HEDDLE_REGISTER(LightningBackward);
HEDDLE_EXPLAIN(LightningBackward, kVariants);

}  // namespace
}  // namespace heddle
