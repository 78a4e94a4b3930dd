#include "attention/gather_sm80.cuh"

#include <bit>

#include "attention/gather_sm80.h"

namespace heddle {
const char* declines_gather_sm80(const Attention& op, const CudaContext& context) {
  if (!op.mask_index) return "mask must be one of hip, whose lists are in order";
  if (context.arch == 90 && op.mask_block_k >= 64)
    return "mask must have blocks of less than 64 keys";
  if ((op.block_table ? op.block_table.shape[1] : 1) * op.k.shape[1] >= kMostGathered)
    return "sk must be less than 2^30";
  if (size_of(op.q.dtype) != 2) return "q must be of 16 bits";
  if (op.weights != Attention::kSoftmax) return "weights must be of softmax";
  if (op.bias || op.slopes || op.sink || op.cosine)
    return "bias, slopes, sink and cosine must be left out";
  if (op.cu_seqlens_q) return "cuSeqlensQ must be left out";
  const int64_t d = op.q.shape[3];
  if ((d != 64 && d != 128) || op.v.shape[3] != d) return "d and dv must be both 64 or 128";
  if (op.mask_block_q > kGatherTile && op.mask_block_q % kGatherTile != 0)
    return "mask must have blocks of up to 64 queries or a multiple of 64";
  if (op.mask_columns || op.mask_diagonals || op.mask_bounds || !op.causal)
    return "mask must be causal and have no other lists";
  for (const Tensor* x : {&op.q, &op.k, &op.v})
    if (reinterpret_cast<uintptr_t>(x->data) % 16 != 0 || x->strides[3] != 1 ||
        x->strides[0] % 8 != 0 || x->strides[1] % 8 != 0 || x->strides[2] % 8 != 0)
      return "q, k and v must be aligned to 16 bytes";
  return nullptr;
}

void gather_sm80(const Attention& op, const ForwardArgs& call, CudaContext& context) {
  GatherArgs args{};
  args.call = call;
  args.index = op.mask_index.as<int32_t>();
  args.count = op.mask_count.as<int32_t>();
  args.lists = op.mask_index.shape[1];
  args.rows = op.mask_index.shape[2];
  args.width = op.mask_index.shape[3];
  args.page_size_log2 = std::countr_zero(static_cast<uint64_t>(call.page_size));
  args.block_q = static_cast<int>(std::min<int64_t>(op.mask_block_q, kGatherTile));
  // Heads can share a tile if they share its list
  const int64_t group = call.hq / call.hk;
  args.heads = args.lists > call.hk
                   ? 1
                   : static_cast<int>(std::min<int64_t>(group, kGatherTile / args.block_q));
  args.head_tiles = static_cast<int>((group + args.heads - 1) / args.heads);
  const int64_t tiles = (call.sq + args.block_q - 1) / args.block_q;
  const int64_t heads = call.hk * args.head_tiles;
  HEDDLE_CHECK(tiles < INT32_MAX && heads <= 65535 && call.b <= 65535, kUnsupported, "q",
               "q has too many rows or heads for one call");
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(heads),
                  static_cast<unsigned>(call.b));
  const auto launch = [&]<class T, int kD>() {
    auto* kernel = gather_sm80_kernel<T, kD>;
    constexpr int kBytes = sizeof(GatherSmem<T, kD>);
    HEDDLE_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
    kernel<<<grid, kGatherThreads, kBytes, context.stream>>>(args);
  };
  const auto of_type = [&]<class T>() {
    if (call.d == 64) return launch.template operator()<T, 64>();
    launch.template operator()<T, 128>();
  };
  if (op.q.dtype == DType::kBF16) {
    of_type.template operator()<BF16>();
  } else {
    of_type.template operator()<F16>();
  }
  context.launched("gather_sm80_kernel");
}

}  // namespace heddle
