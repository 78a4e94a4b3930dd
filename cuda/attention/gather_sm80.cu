#include "attention/gather_sm80.cuh"

#include <algorithm>

#include "attention/gather_sm80.h"
#include "common/launch.h"

namespace heddle {
namespace {

template <class T, int kD, bool kSplit>
__global__ void __launch_bounds__(kGatherThreads)
    gather_sm80_kernel(const __grid_constant__ GatherArgs args) {
  extern __shared__ __align__(16) char smem[];
  gather_attention<T, kD, kSplit>(args, *reinterpret_cast<GatherSmem<T, kD>*>(smem));
}

}  // namespace

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
  for (const Tensor* x : {&op.q, &op.k, &op.v, &op.recent_k, &op.recent_v})
    if (reinterpret_cast<uintptr_t>(x->data) % 16 != 0 || (*x && x->strides[3] != 1) ||
        x->strides[0] % 8 != 0 || x->strides[1] % 8 != 0 || x->strides[2] % 8 != 0)
      return "q, k and v must be aligned to 16 bytes";
  return nullptr;
}

GatherLists lists_of(const Attention& op) {
  const int64_t* shape = op.mask_index.shape;
  return {op.mask_index.as<int32_t>(), op.mask_count.as<int32_t>(), shape[1], shape[2], shape[3]};
}

void gather_sm80(const Attention& op, const ForwardArgs& call, CudaContext& context) {
  GatherArgs args{};
  args.call = call;
  args.lists = lists_of(op);
  args.recent_k = Heads(op.recent_k);
  args.recent_v = Heads(op.recent_v);
  args.recent_from = static_cast<int>(op.recent_from);
  args.recents = static_cast<int>(op.recent_k.shape[1]);
  const GatherGrid grid = plan_gather(args);
  const int64_t units = grid.units();
  // Two CTAs fit on a multiprocessor. A share of less than two tiles is mostly waiting.
  const int64_t keys = call.mask.sink_tokens + args.lists.width * op.mask_block_k + args.block_q +
                       std::min(call.mask.window, call.sk);
  const int64_t most = (std::min(keys, call.sk) + kGatherTile - 1) / kGatherTile / 2;
  const int64_t splits =
      std::clamp<int64_t>(2 * context.processors / units, 1, std::max<int64_t>(most, 1));
  args.splits = static_cast<int>(splits);
  const bool shared = splits > 1 || op.recent_k;
  if (shared) {
    const auto sums = static_cast<size_t>(units * splits * args.block_q * args.heads);
    args.part_out = context.scratch<float>(sums * static_cast<size_t>(call.d));
    args.part_state = context.scratch<float2>(sums);
    args.arrivals = context.counters(static_cast<size_t>(units));
  }
  const int64_t row_ctas = grid.row_tiles * splits;
  HEDDLE_CHECK(row_ctas < INT32_MAX && grid.heads <= 65535 && grid.b <= 65535, kUnsupported, "q",
               "q has too many rows or heads for one call");
  const dim3 ctas(static_cast<unsigned>(row_ctas), static_cast<unsigned>(grid.heads),
                  static_cast<unsigned>(grid.b));
  const auto launch = [&]<class T, int kD, bool kSplit>() {
    static uint64_t ready = 0;
    auto* kernel = gather_sm80_kernel<T, kD, kSplit>;
    constexpr int kBytes = sizeof(GatherSmem<T, kD>);
    allow_shared_memory(reinterpret_cast<const void*>(kernel), kBytes, ready);
    kernel<<<ctas, kGatherThreads, kBytes, context.stream>>>(args);
  };
  const auto of_size = [&]<class T, int kD>() {
    if (shared) return launch.template operator()<T, kD, true>();
    launch.template operator()<T, kD, false>();
  };
  const auto of_type = [&]<class T>() {
    if (call.d == 64) return of_size.template operator()<T, 64>();
    of_size.template operator()<T, 128>();
  };
  if (op.q.dtype == DType::kBF16) {
    of_type.template operator()<BF16>();
  } else {
    of_type.template operator()<F16>();
  }
  context.launched("gather_sm80_kernel");
}

}  // namespace heddle
