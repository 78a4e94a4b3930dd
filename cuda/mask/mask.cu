#include "ops/mask.h"

#include "common/elements.cuh"
#include "core/slot.h"

namespace heddle {
namespace {

struct PackArgs {
  int32_t* blocks;
  int64_t lines, heads, rows, words, columns, width, most, listed, run, given;
  int* fault;
};

__device__ void list_block(const PackArgs& p, int64_t line, int64_t c) {
  if (c < 0 || c >= p.columns) {
    *p.fault = 1;
    return;
  }
  atomicOr(p.blocks + line * p.words + c / 32, static_cast<int32_t>(1u << c % 32));
}

// One thread per entry of the lists. Bits are set by atomics, whose order does not matter.
__global__ void mask_pack_dense_kernel(PackArgs p, Strided dense) {
  HEDDLE_EACH(i, p.lines * p.columns)
  if (dense.at<uint8_t>(i)) list_block(p, i / p.columns, i % p.columns);
}

template <class T> __global__ void mask_pack_bits_kernel(PackArgs p, Strided bits) {
  constexpr int kBits = 8 * sizeof(T);
  HEDDLE_EACH(i, p.lines * p.columns) {
    const int64_t line = i / p.columns, c = i % p.columns;
    if (bits.at<T>(line * p.given + c / kBits) >> c % kBits & 1) list_block(p, line, c);
  }
}

__global__ void mask_pack_padded_kernel(PackArgs p, Strided count, Strided index) {
  HEDDLE_EACH(i, p.lines * p.width) {
    const int64_t line = i / p.width, entries = count.at<int32_t>(line);
    if (entries < 0 || entries > p.width) *p.fault = 1;
    if (i % p.width >= entries) continue;
    const int64_t first = index.at<int32_t>(i);
    list_block(p, line, first);
    for (int64_t c = first + 1; c < min(first + p.run, p.columns); ++c) list_block(p, line, c);
  }
}

// One warp per row of blocks
__global__ void mask_pack_rows_kernel(PackArgs p, Strided row_ptr, Strided column) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / 32);
  for (int64_t line = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; line < p.lines;
       line += warps) {
    const int64_t from = row_ptr.at<int32_t>(line), to = row_ptr.at<int32_t>(line + 1);
    if ((line == 0 && from != 0) || from < 0 || from > to || to > p.listed) {
      *p.fault = 1;
      continue;
    }
    for (int64_t i = from + threadIdx.x % 32; i < to; i += 32)
      list_block(p, line, column.at<int32_t>(i));
  }
}

__global__ void mask_pack_flat_kernel(PackArgs p, Strided flat) {
  HEDDLE_EACH(i, p.lines / p.rows * p.most) {
    const int64_t pair = flat.at<int32_t>(i);
    if (pair >= 0 && pair < p.rows * p.columns)
      list_block(p, i / p.most * p.rows + pair / p.columns, pair % p.columns);
  }
}

void run(const MaskPack& op, CudaContext& context) {
  PackArgs args{};
  args.blocks = op.blocks.as<int32_t>();
  args.heads = op.blocks.shape[1];
  args.rows = op.blocks.shape[2];
  args.words = op.blocks.shape[3];
  args.lines = op.blocks.shape[0] * args.heads * args.rows;
  args.columns = op.columns;
  args.run = op.run;
  if (args.lines == 0) return;
  args.fault = context.fault(
      op.row_ptr ? "rowPtr must start at 0, never descend and end inside column, and column must "
                   "name blocks of the row"
                 : "index must name blocks of the row, and count must not pass its width");
  if (op.dense && args.columns > 0) {
    mask_pack_dense_kernel<<<blocks_for(args.lines * args.columns, context), kThreads, 0,
                             context.stream>>>(args, Strided(op.dense));
    context.launched("mask_pack_dense_kernel");
  }
  if (op.bits && args.columns > 0) {
    const auto grid = blocks_for(args.lines * args.columns, context);
    args.given = op.bits.shape[3];
    if (op.bits.dtype == DType::kI64)
      mask_pack_bits_kernel<int64_t><<<grid, kThreads, 0, context.stream>>>(args, Strided(op.bits));
    else
      mask_pack_bits_kernel<int32_t><<<grid, kThreads, 0, context.stream>>>(args, Strided(op.bits));
    context.launched("mask_pack_bits_kernel");
  }
  if (op.count && op.index.shape[3] > 0) {
    args.width = op.index.shape[3];
    mask_pack_padded_kernel<<<blocks_for(args.lines * args.width, context), kThreads, 0,
                              context.stream>>>(args, Strided(op.count), Strided(op.index));
    context.launched("mask_pack_padded_kernel");
  }
  if (op.row_ptr) {
    args.listed = op.column.shape[0];
    mask_pack_rows_kernel<<<blocks_for(args.lines * 32, context), kThreads, 0, context.stream>>>(
        args, Strided(op.row_ptr), Strided(op.column));
    context.launched("mask_pack_rows_kernel");
  }
  if (op.flat && op.flat.shape[2] > 0) {
    args.most = op.flat.shape[2];
    mask_pack_flat_kernel<<<blocks_for(args.lines / args.rows * args.most, context), kThreads, 0,
                            context.stream>>>(args, Strided(op.flat));
    context.launched("mask_pack_flat_kernel");
  }
}

HEDDLE_REGISTER(MaskPack);

}  // namespace

namespace {

__global__ void mask_combine_kernel(Strided bits, Strided other, int64_t count, bool intersect) {
  HEDDLE_EACH(i, count) {
    int32_t& to = bits.at<int32_t>(i);
    to = intersect ? to & other.at<int32_t>(i) : to | other.at<int32_t>(i);
  }
}

void run(const MaskCombine& op, CudaContext& context) {
  const int64_t count = op.bits.size();
  if (count == 0) return;
  mask_combine_kernel<<<blocks_for(count, context), kThreads, 0, context.stream>>>(
      Strided(op.bits), Strided(op.other), count, op.intersect);
  context.launched("mask_combine_kernel");
}

HEDDLE_REGISTER(MaskCombine);

}  // namespace
}  // namespace heddle
