#pragma once
#include <algorithm>

#include "common/sm90.cuh"
#include "common/tensor_map.h"
#include "common/tile.cuh"
#include "linear/linear_sm90.h"

// out[m, o] = x[m, i] . weight[o, i] + bias[o]
//
// A tile is 128 rows by 128 or 256 columns; slices 64 deep pass by in a ring of stages. Warpgroup 0
// loads, the other two compute 64 rows each, with one slice in flight behind the one being issued.
// CTAs stay and walk over tiles, so the first slices of a tile load under the end of the last one.
namespace heddle {
namespace {

constexpr int kLinearRows = 128, kLinearDepth = 64, kLinearThreads = 384;

template <int kColumns> struct LinearSmem {
  static constexpr int kStages = kColumns == 256 ? 4 : 6;
  sm90::Tile<kLinearRows, kLinearDepth> x[kStages];
  sm90::Tile<kColumns, kLinearDepth> weight[kStages];
  sm90::Barrier full[kStages], empty[kStages];
};

struct LinearTiles {
  int rows, columns;  // how many of each

  struct Place {
    int row, column;
  };
  // Neighbours in time are neighbours in both directions, so that L2 holds what they share
  __device__ __forceinline__ Place at(int index) const {
    constexpr int kBand = 8;
    const int band = index / (kBand * columns), inside = index % (kBand * columns);
    const int height = min(kBand, rows - band * kBand);
    return {band * kBand + inside % height, inside / height};
  }
};

struct LinearArgs {
  LinearTiles tiles;
  int rows, slices;
  int64_t outputs;
  const void* bias;
  int64_t bias_stride;
  void* out;
  bool f32_out;
};

template <DType kType, int kColumns>
__global__ void __launch_bounds__(kLinearThreads, 1)
    linear_sm90_kernel(const __grid_constant__ sm90::TensorMap gmem_x,
                       const __grid_constant__ sm90::TensorMap gmem_weight, const LinearArgs args) {
  using namespace sm90;
  using Smem = LinearSmem<kColumns>;
  constexpr int kStages = Smem::kStages;
  auto& smem = shared_memory<Smem>();
  // the same in all lanes, which the compiler cannot know of threadIdx
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      smem.full[stage].init(1);
      smem.empty[stage].init(8);
    }
    fence_barrier_init();
  }
  __syncthreads();

  const int tiles = args.tiles.rows * args.tiles.columns;
  uint32_t used = 0;  // slices
  if (warpgroup == 0) {
    lower_registers<40>();
    if (threadIdx.x < 32 && elect_one()) {
      prefetch(gmem_x);
      prefetch(gmem_weight);
      for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
        const LinearTiles::Place tile = args.tiles.at(index);
        for (int slice = 0; slice < args.slices; ++slice, ++used) {
          const Turn<kStages> turn(used);
          smem.empty[turn.stage].wait(turn.parity ^ 1);
          Barrier& full = smem.full[turn.stage];
          full.arrive_expect(smem.x[0].kBytes + smem.weight[0].kBytes);
          const int k = slice * kLinearDepth;
          copy_to_smem(smem.x[turn.stage].bytes, gmem_x, full, k, tile.row * kLinearRows, 0, 0,
                       Keep::kNormal);
          copy_to_smem(smem.weight[turn.stage].bytes, gmem_weight, full, k, tile.column * kColumns,
                       0, 0, Keep::kNormal);
        }
      }
    }
    return;
  }

  raise_registers<232>();
  const int own = warpgroup - 1, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  // element i is in row i / 2 % 2 of lane / 4 and lane / 4 + 8, and in column
  // 8 * (i / 4) + 2 * (lane % 4) + i % 2
  float acc[kColumns / 2];
  auto release = [&](uint32_t slice) {
    if (lane == 0) smem.empty[Turn<kStages>(slice).stage].arrive();
  };
  auto put = [&](int64_t row, int64_t column, float first, float second) {
    const bool both = column + 1 < args.outputs;
    if (args.bias) {
      const auto bias = [&](int64_t at) {
        return unpack<kType>(static_cast<const uint16_t*>(args.bias)[at * args.bias_stride]);
      };
      first += bias(column);
      if (both) second += bias(column + 1);
    }
    const int64_t at = row * args.outputs + column;
    if (args.f32_out) {
      auto* out = static_cast<float*>(args.out) + at;
      out[0] = first;
      if (both) out[1] = second;
      return;
    }
    auto* out = static_cast<uint16_t*>(args.out) + at;
    const uint32_t packed = pack<kType>(first, second);
    if (both && at % 2 == 0) {
      *reinterpret_cast<uint32_t*>(out) = packed;
    } else {
      out[0] = static_cast<uint16_t>(packed);
      if (both) out[1] = static_cast<uint16_t>(packed >> 16);
    }
  };

  for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
    const LinearTiles::Place tile = args.tiles.at(index);
    for (int slice = 0; slice < args.slices; ++slice, ++used) {
      const Turn<kStages> turn(used);
      smem.full[turn.stage].wait(turn.parity);
      wgmma_fence(acc);
#pragma unroll
      for (int k = 0; k < kLinearDepth; k += 16)
        wgmma<kType, Major::kK>(acc, smem.x[turn.stage].k_major(own * 64, k),
                                smem.weight[turn.stage].k_major(0, k), slice > 0 || k > 0);
      wgmma_commit();
      wgmma_wait<1>(acc);
      if (slice > 0) release(used - 1);
    }
    wgmma_wait<0>(acc);
    release(used - 1);

    const int row = tile.row * kLinearRows + own * 64 + warp * 16 + lane / 4;
    const int64_t column = static_cast<int64_t>(tile.column) * kColumns + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kColumns / 2; i += 2) {
      const int r = row + i / 2 % 2 * 8;
      const int64_t c = column + i / 4 * 8;
      if (r < args.rows && c < args.outputs) put(r, c, acc[i], acc[i + 1]);
    }
  }
}

template <DType kType, int kColumns>
void launch_linear(const LinearCall& call, cudaStream_t stream) {
  const auto map = [&](const void* data, int64_t rows, int64_t stride, int box) {
    return make_tensor_map(kType, data, {call.inputs, rows, 1, 1, stride, 0, 0}, box);
  };
  const auto parts = [](int64_t size, int64_t part) {
    return static_cast<int>((size + part - 1) / part);
  };
  const LinearTiles tiles{parts(call.rows, kLinearRows), parts(call.outputs, kColumns)};
  const LinearArgs args{tiles,
                        static_cast<int>(call.rows),
                        parts(call.inputs, kLinearDepth),
                        call.outputs,
                        call.bias,
                        call.bias_stride,
                        call.out,
                        call.out_dtype == DType::kF32};
  launch<linear_sm90_kernel<kType, kColumns>>(
      {std::min(tiles.rows * tiles.columns, call.processors), kLinearThreads,
       sm90::shared_memory_bytes<LinearSmem<kColumns>>(), stream},
      map(call.x, call.rows, call.x_row, kLinearRows),
      map(call.weight, call.outputs, call.weight_row, kColumns), args);
}

}  // namespace

template <DType kType> void launch_linear_sm90(const LinearCall& call, cudaStream_t stream) {
  // wide tiles read less, narrow ones keep more of the chip busy
  const int64_t wide = (call.rows + 127) / 128 * ((call.outputs + 255) / 256);
  wide >= call.processors ? launch_linear<kType, 256>(call, stream)
                          : launch_linear<kType, 128>(call, stream);
}

}  // namespace heddle
