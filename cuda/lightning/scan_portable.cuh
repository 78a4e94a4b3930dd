#pragma once
#include "common/elements.cuh"
#include "common/launch.h"
#include "lightning/bad_slope.cuh"
#include "ops/lightning.h"

// The chunk form on any GPU from sm_80 on, in f32 arithmetic; cpu/lightning_chunk.h has its
// formulas. A CTA of 256 threads owns one output head of one sequence and 32 columns of its values,
// walks the sequence chunk by chunk and keeps the state in shared memory. Thread t works on column
// t % 32. Backward in time the same walk gives gradients:
//
//   o_t = q_t G_t,   G_t = R_t + scale k_t^T v_t,   R_{t-1} = lambda G_t
namespace heddle {
namespace {

constexpr int kColumns = 32, kScanThreads = 256, kLanes = kScanThreads / kColumns;

struct PortableArgs {
  Strided q, k, v;
  const float* slopes;
  int64_t slopes_stride;
  const int32_t* cu_seqlens;
  int64_t cu_stride;
  Strided initial_state{Tensor()};
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

template <class T, class Out, bool kReverse>
__global__ void __launch_bounds__(kScanThreads) lightning_scan_kernel(PortableArgs p) {
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
    // heads that share a state have its gradient once
    smem_state[i * kColumns + f] =
        p.has_initial && inside && (!kReverse || head % (p.heads / p.heads_state) == 0)
            ? reinterpret_cast<const float*>(
                  from.data)[sequence * from.strides[0] + state_head * from.strides[1] +
                             i * from.strides[2] + column * from.strides[3]]
            : 0;
  }

  const int head_q = head / (p.heads / p.heads_q), head_k = head / (p.heads / p.heads_k);
  const int head_v = head / (p.heads / p.heads_v);
  const int64_t chunks = (end - begin + p.chunk - 1) / p.chunk;
  for (int64_t visit = 0; visit < chunks; ++visit) {
    const int64_t t0 = begin + (kReverse ? chunks - 1 - visit : visit) * p.chunk;
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
      if (kReverse ? key >= row : key <= row) {
        for (int c = 0; c < p.d; ++c)
          dot = fmaf(smem_q[row * width + c], smem_k[key * width + c], dot);
        dot *= powers[abs(row - key)];
      }
      smem_p[row * (p.chunk + 1) + key] = dot;
    }
    __syncthreads();
    for (int t = lane; t < m; t += kLanes) {
      float carried = 0, near = 0;
      for (int c = 0; c < p.d; ++c)
        carried = fmaf(smem_q[t * width + c], smem_state[c * kColumns + f], carried);
      for (int key = kReverse ? t : 0; key < (kReverse ? m : t + 1); ++key)
        near = fmaf(smem_p[t * (p.chunk + 1) + key], smem_v[key * kColumns + f], near);
      if (inside)
        static_cast<Out*>(p.out)[((batch * p.tokens + t0 + t) * p.heads + head) * p.e + column] =
            from_float<Out>(kReverse ? fmaf(powers[m - 1 - t], carried, p.scale * near)
                                     : p.scale * fmaf(powers[t + 1], carried, near));
    }
    __syncthreads();
    for (int c = lane; c < p.d; c += kLanes) {
      float sum = powers[m] * smem_state[c * kColumns + f];
      for (int t = 0; t < m; ++t)
        sum = fmaf((kReverse ? p.scale * powers[t + 1] : powers[m - 1 - t]) * smem_k[t * width + c],
                   smem_v[t * kColumns + f], sum);
      smem_state[c * kColumns + f] = sum;
    }
  }
  // Forward, heads that share a state all arrive at the same one; backward each has a part of it
  const bool own = kReverse || head % (p.heads / p.heads_state) == 0;
  const int64_t to = kReverse ? sequence * p.heads + head : sequence * p.heads_state + state_head;
  if (p.state && inside && own)
    for (int i = lane; i < p.d; i += kLanes)
      p.state[(to * p.d + i) * p.e + column] = smem_state[i * kColumns + f];
}

inline const char* scan_fault_text(const Tensor& cu_seqlens) {
  return cu_seqlens ? "cuSeqlens must start at 0, never descend and end at s, and slopes be finite "
                      "and at least 0"
                    : "slopes must be finite and at least 0";
}

// What passes over q, k and v have in common; `op` is a scan or its backward
template <class Op> PortableArgs portable_args(const Op& op, int* fault) {
  const LightningHeads heads(op.q, op.k, op.v, op.slopes);
  PortableArgs args{Strided(op.q), Strided(op.k), Strided(op.v)};
  args.slopes = op.slopes.template as<float>();
  args.slopes_stride = op.slopes.strides[0];
  args.cu_seqlens = op.cu_seqlens ? op.cu_seqlens.template as<int32_t>() : nullptr;
  args.cu_stride = op.cu_seqlens.strides[0];
  args.tokens = op.q.shape[1];
  args.sequences = op.cu_seqlens ? op.cu_seqlens.shape[0] - 1 : op.q.shape[0];
  args.heads_q = static_cast<int>(heads.q);
  args.heads_k = static_cast<int>(heads.k);
  args.heads_v = static_cast<int>(heads.v);
  args.heads = static_cast<int>(heads.out);
  args.heads_state = static_cast<int>(heads.states);
  args.d = static_cast<int>(op.q.shape[3]);
  args.e = static_cast<int>(op.v.shape[3]);
  args.scale = static_cast<float>(op.scale);
  args.fault = fault;
  return args;
}

template <class T, class Out, bool kReverse>
void launch_scan(PortableArgs args, CudaContext& context) {
  args.chunk = args.d > 128 ? 16 : 32;
  const int64_t tasks = args.sequences * args.heads * ((args.e + kColumns - 1) / kColumns);
  if (tasks == 0) return;
  HEDDLE_CHECK(tasks < INT32_MAX, kUnsupported, "q",
               "q has too many heads and sequences for one call");
  const size_t smem_bytes =
      sizeof(float) *
      static_cast<size_t>(args.d * kColumns + 2 * args.chunk * (args.d + 1) +
                          args.chunk * kColumns + args.chunk * (args.chunk + 1) + args.chunk + 1);
  launch_grid(lightning_scan_kernel<T, Out, kReverse>, static_cast<unsigned>(tasks), kScanThreads,
              smem_bytes, context.stream, args);
  context.launched("lightning_scan_kernel");
}

}  // namespace
}  // namespace heddle
