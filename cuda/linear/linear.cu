#include "ops/linear.h"

#include "common/elements.cuh"
#include "common/lanes.cuh"
#include "common/variants.h"
#include "core/slot.h"
#include "linear/linear_sm90.h"

namespace heddle {
namespace {

// out[m, o] = x[m, i] . weight[o, i] + bias[o], products and sums in f32.
// A tile is 64 rows by 64 columns, 16 deep; each of 256 threads owns 4 by 4 of it.
constexpr int kTile = 64, kDepth = 16, kEach = 4;
// so few rows are read again from cache by every column instead
constexpr int64_t kFewRows = 4;

struct PortableArgs {
  Strided x;
  const void *weight, *bias;
  void* out;
  int64_t weight_row, weight_column, bias_stride, rows, inputs, outputs;
};

template <class T, class Out> __global__ void linear_kernel(PortableArgs p) {
  __shared__ float smem_x[kDepth][kTile + 4], smem_w[kDepth][kTile + 4];
  const int64_t tiles = (p.outputs + kTile - 1) / kTile;
  const int64_t row0 = blockIdx.x / tiles * kTile, column0 = blockIdx.x % tiles * kTile;
  const int row = threadIdx.x / 16 * kEach, column = threadIdx.x % 16 * kEach;
  const auto* weight = static_cast<const T*>(p.weight);
  float acc[kEach][kEach] = {};
  for (int64_t k0 = 0; k0 < p.inputs; k0 += kDepth) {
    for (int i = threadIdx.x; i < kTile * kDepth; i += 256) {
      const int r = i / kDepth, k = i % kDepth;
      const bool inside = k0 + k < p.inputs;
      smem_x[k][r] =
          inside && row0 + r < p.rows ? to_float(p.x.at<T>((row0 + r) * p.inputs + k0 + k)) : 0;
      smem_w[k][r] =
          inside && column0 + r < p.outputs
              ? to_float(weight[(column0 + r) * p.weight_row + (k0 + k) * p.weight_column])
              : 0;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      float a[kEach], b[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) a[i] = smem_x[k][row + i];
#pragma unroll
      for (int i = 0; i < kEach; ++i) b[i] = smem_w[k][column + i];
#pragma unroll
      for (int i = 0; i < kEach; ++i)
#pragma unroll
        for (int j = 0; j < kEach; ++j) acc[i][j] = fmaf(a[i], b[j], acc[i][j]);
    }
    __syncthreads();
  }
  for (int i = 0; i < kEach; ++i) {
    for (int j = 0; j < kEach; ++j) {
      const int64_t r = row0 + row + i, c = column0 + column + j;
      if (r >= p.rows || c >= p.outputs) continue;
      const float bias = p.bias ? to_float(static_cast<const T*>(p.bias)[c * p.bias_stride]) : 0;
      static_cast<Out*>(p.out)[r * p.outputs + c] = from_float<Out>(acc[i][j] + bias);
    }
  }
}

// A few rows: one warp per number of the result, along the contiguous side of the weights
template <class T, class Out> __global__ void linear_rows_kernel(PortableArgs p) {
  const int lane = threadIdx.x % 32;
  const int64_t c = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (c >= p.outputs) return;
  const auto* weight = static_cast<const T*>(p.weight) + c * p.weight_row;
  const float bias = p.bias ? to_float(static_cast<const T*>(p.bias)[c * p.bias_stride]) : 0;
  for (int64_t r = 0; r < p.rows; ++r) {
    float sum = 0;
    for (int64_t i = lane; i < p.inputs; i += 32)
      sum = fmaf(to_float(p.x.at<T>(r * p.inputs + i)), to_float(weight[i * p.weight_column]), sum);
    sum = warp_sum(sum);
    if (lane == 0) static_cast<Out*>(p.out)[r * p.outputs + c] = from_float<Out>(sum + bias);
  }
}

// The same by 16 bytes, all rows at once: reading the weights is the floor
template <class T, class Out>
__global__ void linear_rows_wide_kernel(PortableArgs p, int64_t x_row) {
  constexpr int kCount = Wide<T>::kCount;
  const int lane = threadIdx.x % 32;
  const int64_t c = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (c >= p.outputs) return;
  const auto* weight =
      reinterpret_cast<const Wide<T>*>(static_cast<const T*>(p.weight) + c * p.weight_row);
  const auto* x = reinterpret_cast<const Wide<T>*>(p.x.data);
  float sum[kFewRows] = {};
#pragma unroll 4
  for (int64_t i = lane; i < p.inputs / kCount; i += 32) {
    const Wide<T> wide = weight[i];
#pragma unroll
    for (int r = 0; r < kFewRows; ++r) {
      if (r >= p.rows) break;
      const Wide<T> values = x[r * x_row / kCount + i];
#pragma unroll
      for (int e = 0; e < kCount; ++e)
        sum[r] = fmaf(to_float(values.values[e]), to_float(wide.values[e]), sum[r]);
    }
  }
  const float bias = p.bias ? to_float(static_cast<const T*>(p.bias)[c * p.bias_stride]) : 0;
#pragma unroll
  for (int r = 0; r < kFewRows; ++r) {
    const float total = warp_sum(sum[r]);
    if (lane == 0 && r < p.rows)
      static_cast<Out*>(p.out)[r * p.outputs + c] = from_float<Out>(total + bias);
  }
}

// From one row of [..., i] to the next, or 0 if they don't follow each other regularly
int64_t row_stride(const Tensor& x) {
  int64_t stride = 0, rows = 1;
  for (int i = x.rank - 2; i >= 0; --i) {
    if (x.shape[i] == 1) continue;
    if (rows == 1) stride = x.strides[i];
    if (x.strides[i] != stride * rows) return 0;
    rows *= x.shape[i];
  }
  return stride;
}

LinearCall hopper_call(const Linear& op, const CudaContext& context) {
  LinearCall call{};
  call.dtype = op.x.dtype;
  call.out_dtype = op.out.dtype;
  call.outputs = op.weight.shape[0];
  call.inputs = op.weight.shape[1];
  call.rows = op.out.size() / call.outputs;
  call.x = op.x.data;
  call.weight = op.weight.data;
  call.bias = op.bias ? op.bias.data : nullptr;
  call.out = op.out.data;
  call.x_row = row_stride(op.x);
  call.weight_row = op.weight.strides[0];
  call.bias_stride = op.bias.strides[0];
  call.processors = context.processors;
  return call;
}

const char* declines_hopper(const Linear& op, const CudaContext& context) {
  if (context.arch != 90) return "the GPU must be of compute capability 9.0";
  const int last = op.x.rank - 1;
  if (op.x.strides[last] != 1 || op.weight.strides[1] != 1)
    return "x and weight must be contiguous along i";
  const LinearCall call = hopper_call(op, context);
  return call.rows <= kFewRows ? "x must have more than 4 rows" : declines_linear_sm90(call);
}

void run_hopper(const Linear& op, CudaContext& context) {
  linear_sm90(hopper_call(op, context), context.stream);
  context.launched("linear_sm90_kernel");
}

const char* declines_portable(const Linear&, const CudaContext&) { return nullptr; }

void run_portable(const Linear& op, CudaContext& context) {
  const int64_t outputs = op.weight.shape[0], inputs = op.weight.shape[1];
  const PortableArgs args{Strided(op.x),
                          op.weight.data,
                          op.bias ? op.bias.data : nullptr,
                          op.out.data,
                          op.weight.strides[0],
                          op.weight.strides[1],
                          op.bias.strides[0],
                          op.out.size() / outputs,
                          inputs,
                          outputs};
  dispatch_float(op.x.dtype, [&]<class T>(T) {
    dispatch_float(op.out.dtype, [&]<class Out>(Out) {
      if (args.rows <= kFewRows) {
        const auto blocks = static_cast<unsigned>((outputs + 7) / 8);
        const int64_t x_row = row_stride(op.x);
        if (op.x.strides[op.x.rank - 1] == 1 && op.weight.strides[1] == 1 &&
            (args.rows == 1 || x_row > 0) && Wide<T>::fits(op.x.data, inputs, x_row) &&
            Wide<T>::fits(args.weight, inputs, args.weight_row)) {
          linear_rows_wide_kernel<T, Out><<<blocks, 256, 0, context.stream>>>(args, x_row);
          return;
        }
        linear_rows_kernel<T, Out><<<blocks, 256, 0, context.stream>>>(args);
      } else {
        const int64_t tiles = (args.rows + kTile - 1) / kTile * ((outputs + kTile - 1) / kTile);
        HEDDLE_CHECK(tiles < INT32_MAX, kUnsupported, "x", "x has too many rows for one call");
        linear_kernel<T, Out><<<static_cast<unsigned>(tiles), 256, 0, context.stream>>>(args);
      }
    });
  });
  context.launched("linear_kernel");
}

constexpr Variant<Linear> kVariants[] = {
    {"sm90_wgmma", declines_hopper, run_hopper},
    {"sm80_simt", declines_portable, run_portable},
};

void run(const Linear& op, CudaContext& context) {
  if (op.out.size() > 0) run_variants(kVariants, op, context);
}

HEDDLE_REGISTER(Linear);
HEDDLE_EXPLAIN(Linear, kVariants);

}  // namespace
}  // namespace heddle
