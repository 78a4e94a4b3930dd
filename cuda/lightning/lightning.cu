#include "ops/lightning.h"

#include "common/elements.cuh"
#include "core/registry.h"
#include "lightning/forward_sm90.h"

// The chunk form on any GPU from sm_80 on, in f32 arithmetic; cpu/lightning.cpp has its formulas. A
// CTA of 256 threads owns one output head of one sequence and 32 columns of its values, walks the
// sequence chunk by chunk and keeps the state in shared memory. Thread t works on column t % 32.
namespace heddle {
namespace {

constexpr int kColumns = 32, kScanThreads = 256, kLanes = kScanThreads / kColumns;

struct ScanArgs {
  Strided q, k, v;
  const float* slopes;
  int64_t slopes_stride;
  const int32_t* cu_seqlens;
  int64_t cu_stride;
  Strided initial_state;
  void* out;
  float* state;
  int64_t tokens, sequences;
  int heads_q, heads_k, heads_v, heads, heads_state, d, e, chunk;
  float scale;
  bool has_initial;
  int* fault;
};

template <class T>
__device__ float head_row(const Strided& x, int64_t batch, int64_t token, int64_t head, int64_t i) {
  return to_float(reinterpret_cast<const T*>(x.data)[batch * x.strides[0] + token * x.strides[1] +
                                                     head * x.strides[2] + i * x.strides[3]]);
}

__device__ bool bad_slope(float slope) { return !(slope >= 0) || isinf(slope); }

template <class T>
__global__ void __launch_bounds__(kScanThreads) lightning_scan_kernel(ScanArgs p) {
  extern __shared__ float smem[];
  const int width = p.d + 1;
  float* smem_state = smem;                          // [d, 32]
  float* smem_q = smem_state + p.d * kColumns;       // [chunk, d + 1]
  float* smem_k = smem_q + p.chunk * width;          // [chunk, d + 1]
  float* smem_v = smem_k + p.chunk * width;          // [chunk, 32]
  float* smem_p = smem_v + p.chunk * kColumns;       // [chunk, chunk + 1]
  float* powers = smem_p + p.chunk * (p.chunk + 1);  // [chunk + 1]

  const int slices = (p.e + kColumns - 1) / kColumns;
  const int64_t task = blockIdx.x, sequence = task / slices / p.heads;
  const int head = static_cast<int>(task / slices % p.heads),
            column0 = static_cast<int>(task % slices) * kColumns;
  const int state_head = head / (p.heads / p.heads_state);
  const int thread = threadIdx.x, f = thread % kColumns, lane = thread / kColumns,
            column = column0 + f;
  const bool inside = column < p.e;
  int64_t batch = sequence, begin = 0, end = p.tokens;
  if (p.cu_seqlens) {
    batch = 0;
    begin = p.cu_seqlens[sequence * p.cu_stride];
    end = p.cu_seqlens[(sequence + 1) * p.cu_stride];
    const bool ends = sequence + 1 < p.sequences || end == p.tokens;
    if (begin < 0 || end < begin || end > p.tokens || (sequence == 0 && begin != 0) || !ends) {
      if (thread == 0) *p.fault = 1;
      return;
    }
  }
  const float slope = p.slopes[state_head * p.slopes_stride];
  if (bad_slope(slope) && thread == 0) *p.fault = 1;
  const double log2_decay = -static_cast<double>(slope) * 1.4426950408889634;
  for (int i = thread; i <= p.chunk; i += kScanThreads)
    powers[i] = static_cast<float>(exp2(log2_decay * i));
  for (int i = lane; i < p.d; i += kLanes) {
    const Strided& from = p.initial_state;
    smem_state[i * kColumns + f] =
        p.has_initial && inside
            ? reinterpret_cast<const float*>(
                  from.data)[sequence * from.strides[0] + state_head * from.strides[1] +
                             i * from.strides[2] + column * from.strides[3]]
            : 0;
  }

  const int head_q = head / (p.heads / p.heads_q), head_k = head / (p.heads / p.heads_k);
  const int head_v = head / (p.heads / p.heads_v);
  for (int64_t t0 = begin; t0 < end; t0 += p.chunk) {
    const int m = static_cast<int>(min(int64_t{p.chunk}, end - t0));
    __syncthreads();
    for (int i = thread; i < m * p.d; i += kScanThreads) {
      const int t = i / p.d, c = i % p.d;
      smem_q[t * width + c] = head_row<T>(p.q, batch, t0 + t, head_q, c);
      smem_k[t * width + c] = head_row<T>(p.k, batch, t0 + t, head_k, c);
    }
    for (int t = lane; t < m; t += kLanes)
      smem_v[t * kColumns + f] = inside ? head_row<T>(p.v, batch, t0 + t, head_v, column) : 0;
    __syncthreads();
    for (int i = thread; i < m * m; i += kScanThreads) {
      const int row = i / m, key = i % m;
      float dot = 0;
      if (key <= row) {
        for (int c = 0; c < p.d; ++c)
          dot = fmaf(smem_q[row * width + c], smem_k[key * width + c], dot);
        dot *= powers[row - key];
      }
      smem_p[row * (p.chunk + 1) + key] = dot;
    }
    __syncthreads();
    for (int t = lane; t < m; t += kLanes) {
      float carried = 0, near = 0;
      for (int c = 0; c < p.d; ++c)
        carried = fmaf(smem_q[t * width + c], smem_state[c * kColumns + f], carried);
      for (int key = 0; key <= t; ++key)
        near = fmaf(smem_p[t * (p.chunk + 1) + key], smem_v[key * kColumns + f], near);
      if (inside)
        static_cast<T*>(p.out)[((batch * p.tokens + t0 + t) * p.heads + head) * p.e + column] =
            from_float<T>(p.scale * fmaf(powers[t + 1], carried, near));
    }
    __syncthreads();
    for (int c = lane; c < p.d; c += kLanes) {
      float sum = powers[m] * smem_state[c * kColumns + f];
      for (int t = 0; t < m; ++t)
        sum = fmaf(powers[m - 1 - t] * smem_k[t * width + c], smem_v[t * kColumns + f], sum);
      smem_state[c * kColumns + f] = sum;
    }
  }
  // Heads that share a state all arrive at the same one
  if (p.state && inside && head % (p.heads / p.heads_state) == 0)
    for (int i = lane; i < p.d; i += kLanes)
      p.state[((sequence * p.heads_state + state_head) * p.d + i) * p.e + column] =
          smem_state[i * kColumns + f];
}

int* scan_fault(const Lightning& op, CudaContext& context) {
  return context.fault(op.cu_seqlens
                           ? "cuSeqlens must start at 0, never descend and end at s, and slopes be "
                             "finite and at least 0"
                           : "slopes must be finite and at least 0");
}

int64_t sequences_of(const Lightning& op) {
  return op.cu_seqlens ? op.cu_seqlens.shape[0] - 1 : op.q.shape[0];
}

ScanCall hopper_call(const Lightning& op, const CudaContext& context) {
  const LightningHeads heads(op.q, op.k, op.v, op.slopes);
  const auto strides = [](const Tensor& x) {
    return ScanStrides{x.strides[0], x.strides[1], x.strides[2]};
  };
  ScanCall call{};
  call.dtype = op.q.dtype;
  call.b = op.q.shape[0];
  call.s = op.q.shape[1];
  call.d = op.q.shape[3];
  call.e = op.v.shape[3];
  call.hq = heads.q;
  call.hk = heads.k;
  call.hv = heads.v;
  call.heads = heads.out;
  call.hs = heads.states;
  call.q = op.q.data;
  call.k = op.k.data;
  call.v = op.v.data;
  call.out = op.out.data;
  call.q_strides = strides(op.q);
  call.k_strides = strides(op.k);
  call.v_strides = strides(op.v);
  call.scale = static_cast<float>(op.scale);
  call.slopes = op.slopes.as<float>();
  call.slopes_stride = op.slopes.strides[0];
  call.cu_seqlens = op.cu_seqlens ? op.cu_seqlens.as<int32_t>() : nullptr;
  call.cu_stride = op.cu_seqlens.strides[0];
  call.sequences = sequences_of(op);
  call.initial_state = op.initial_state ? op.initial_state.as<float>() : nullptr;
  std::copy_n(op.initial_state.strides, 4, call.initial_strides);
  call.state = op.state ? op.state.as<float>() : nullptr;
  call.processors = context.processors;
  return call;
}

const char* declines_hopper(const Lightning& op, const CudaContext& context) {
  if (context.arch != 90) return "the GPU must be of compute capability 9.0";
  if (op.q.strides[3] != 1 || op.k.strides[3] != 1 || op.v.strides[3] != 1)
    return "q, k and v must be contiguous along d";
  return declines_scan_sm90(hopper_call(op, context));
}

void run_hopper(const Lightning& op, CudaContext& context) {
  ScanCall call = hopper_call(op, context);
  const ScanPlan plan = plan_scan_sm90(call);
  if (plan.summed > 0)
    call.summaries = context.scratch<float>(static_cast<size_t>(plan.summary_size(call)));
  call.fault = scan_fault(op, context);
  scan_sm90(call, plan, context.stream);
  context.launched("lightning_sm90_kernel");
}

const char* declines_portable(const Lightning&, const CudaContext&) { return nullptr; }

void run_portable(const Lightning& op, CudaContext& context) {
  const LightningHeads heads(op.q, op.k, op.v, op.slopes);
  const auto small = [](int64_t x) { return static_cast<int>(x); };
  ScanArgs args{Strided(op.q),
                Strided(op.k),
                Strided(op.v),
                op.slopes.as<float>(),
                op.slopes.strides[0],
                op.cu_seqlens ? op.cu_seqlens.as<int32_t>() : nullptr,
                op.cu_seqlens.strides[0],
                Strided(op.initial_state ? op.initial_state : op.q),
                op.out.data,
                op.state ? op.state.as<float>() : nullptr,
                op.q.shape[1],
                sequences_of(op),
                small(heads.q),
                small(heads.k),
                small(heads.v),
                small(heads.out),
                small(heads.states),
                small(op.q.shape[3]),
                small(op.v.shape[3]),
                op.q.shape[3] > 128 ? 16 : 32,
                static_cast<float>(op.scale),
                bool(op.initial_state),
                scan_fault(op, context)};
  const int64_t tasks = args.sequences * heads.out * ((args.e + kColumns - 1) / kColumns);
  HEDDLE_CHECK(tasks < INT32_MAX, kUnsupported, "q",
               "q has too many heads and sequences for one call");
  const size_t smem_bytes =
      sizeof(float) *
      static_cast<size_t>(args.d * kColumns + 2 * args.chunk * (args.d + 1) +
                          args.chunk * kColumns + args.chunk * (args.chunk + 1) + args.chunk + 1);
  dispatch_float(op.q.dtype, [&]<class T>(T) {
    auto* kernel = lightning_scan_kernel<T>;
    HEDDLE_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(smem_bytes)));
    kernel<<<static_cast<unsigned>(tasks), kScanThreads, smem_bytes, context.stream>>>(args);
  });
  context.launched("lightning_scan_kernel");
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
HEDDLE_REGISTER(LightningDecode);

}  // namespace
}  // namespace heddle
