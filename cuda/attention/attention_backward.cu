#include "attention/backward_portable.cuh"
#include "common/variants.h"
#include "core/registry.h"

namespace heddle {

extern template void backward_portable<BF16>(const BackwardArgs&, CudaContext&);
extern template void backward_portable<F16>(const BackwardArgs&, CudaContext&);
extern template void backward_portable<float>(const BackwardArgs&, CudaContext&);

namespace {

const char* declines_portable(const AttentionBackward&, const CudaContext&) { return nullptr; }

void run_portable(const AttentionBackward& op, CudaContext& context) {
  BackwardArgs args{};
  args.call = portable_args(op);
  HEDDLE_CHECK(args.call.hq <= 65535 &&
                   (args.call.b + 1) * (std::max(args.call.sq, args.call.sk) / kRowTile + 1) +
                           args.call.sequences <
                       INT32_MAX,
               kUnsupported, "q", "q has too many rows or heads for one call");
  args.out = Heads(op.out);
  args.dout = Heads(op.dout);
  args.dq = op.dq.data;
  args.dk = op.dk.data;
  args.dv = op.dv.data;
  args.lse = op.lse.as<float>();
  args.lse_batch = op.lse.strides[0];
  args.lse_head = op.lse.strides[1];
  args.lse_token = op.lse.strides[2];
  const auto rows = static_cast<size_t>(op.lse.size());
  args.row_lse = context.scratch<float>(rows);
  args.row_delta = context.scratch<float>(rows);
  if (op.sink) args.dsink = op.dsink.as<float>();
  if (op.slopes) {
    args.dslopes = op.dslopes.as<float>();
    args.row_dslope = context.scratch<float>(rows);
  }
  dispatch_float(op.q.dtype, [&]<class T>(T) { backward_portable<T>(args, context); });
}

constexpr Variant<AttentionBackward> kVariants[] = {
    {"sm80_simt", declines_portable, run_portable},
};

void run(const AttentionBackward& op, CudaContext& context) {
  check_lengths(op, portable_args(op), context);
  if (op.q.shape[2] > 0) run_variants(kVariants, op, context);
}

HEDDLE_REGISTER(AttentionBackward);
HEDDLE_EXPLAIN(AttentionBackward, kVariants);

}  // namespace
}  // namespace heddle
