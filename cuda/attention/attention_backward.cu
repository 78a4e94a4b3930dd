#include "attention/backward_portable.cuh"
#include "attention/backward_sm90.h"
#include "attention/hopper_call.h"
#include "common/variants.h"
#include "core/slot.h"

namespace heddle {
namespace {

BackwardArgs backward_args(const AttentionBackward& op, CudaContext& context) {
  BackwardArgs args{};
  args.call = portable_args(op);
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
  if (op.slopes) args.dslopes = op.dslopes.as<float>();
  if (op.level) args.dlevel = op.dlevel.as<float>();
  if (op.dlse) {
    args.dlse = op.dlse.as<float>();
    args.dlse_batch = op.dlse.strides[0];
    args.dlse_head = op.dlse.strides[1];
    args.dlse_token = op.dlse.strides[2];
  }
  return args;
}

BackwardCall backward_call(const AttentionBackward& op, const CudaContext& context) {
  BackwardCall call{};
  static_cast<ForwardCall&>(call) = hopper_call(op, context);
  call.dout = op.dout.data;
  call.dout_strides = {op.dout.strides[0], op.dout.strides[1], op.dout.strides[2]};
  call.lse_batch = op.lse.strides[0];
  call.lse_head = op.lse.strides[1];
  call.lse_row = op.lse.strides[2];
  call.dq = op.dq.data;
  call.dk = op.dk.data;
  call.dv_out = op.dv.data;
  call.deterministic = op.deterministic;
  return call;
}

const char* declines_wgmma(const AttentionBackward& op, const CudaContext& context) {
  if (const char* reason = declines_slots(op)) return reason;
  if (const char* reason = declines_hopper(op, context)) return reason;
  if (op.dlse) return "dlse must be left out";
  if (op.out.strides[3] != 1 || op.dout.strides[3] != 1)
    return "out and dout must be contiguous along d";
  return declines_backward_sm90(backward_call(op, context));
}

void run_wgmma(const AttentionBackward& op, CudaContext& context) {
  BackwardArgs args = backward_args(op, context);
  BackwardCall call = backward_call(op, context);
  call.fault = check_lengths(op, context);
  const GradientTiles tiles(call);
  const auto rows = static_cast<size_t>(tiles.total_rows * tiles.queries);
  call.row_lse = args.row_lse;
  call.row_delta = args.row_delta;
  call.tile_lse_log2 = context.scratch<float>(rows);
  call.tile_delta = context.scratch<float>(rows);
  call.dq_sum = context.scratch<float>(rows * static_cast<size_t>(tiles.columns));
  call.counters = context.scratch<int>(static_cast<size_t>(tiles.counters()));
  call.part_sums = context.scratch<float>(static_cast<size_t>(tiles.part_sums()));
  args.slope_parts = tiles.dslope_parts();
  if (op.slopes) {
    const auto parts = static_cast<size_t>(call.b * call.hq * args.slope_parts);
    call.dslope_parts = context.scratch<float>(parts);
    HEDDLE_CUDA(cudaMemsetAsync(call.dslope_parts, 0, parts * sizeof(float), context.stream));
  }
  if (call.masked) list_units(call, context);
  backward_sm90(call, context.stream);
  context.launched("backward_sm90_kernel");
  if (leaves_marks(call)) backward_redo(args, tiles, tiles.marks(call.counters), context);
  args.dslope_parts = call.dslope_parts;
  sum_heads(args, context);
}

const char* declines_portable(const AttentionBackward&, const CudaContext&) { return nullptr; }

void run_portable(const AttentionBackward& op, CudaContext& context) {
  BackwardArgs args = backward_args(op, context);
  if (op.slopes) {
    args.slope_parts = args.call.sq;
    args.dslope_parts = context.scratch<float>(static_cast<size_t>(op.lse.size()));
  }
  if (op.biased) {
    const auto sums = static_cast<size_t>(op.bias_sums());
    args.dbias = op.dbias.as<float>();
    std::copy_n(op.dbias.shape, 4, args.dbias_shape);
    args.bias_by_row = op.bias_by_row();
    args.bias_by_key = op.bias_by_key();
    args.bias_sums = op.bias_sums() == op.dbias.size() ? args.dbias : context.scratch<float>(sums);
    HEDDLE_CUDA(cudaMemsetAsync(args.bias_sums, 0, sums * sizeof(float), context.stream));
  }
  check_lengths(op, context);
  HEDDLE_CHECK(args.call.hq <= 65535 &&
                   (args.call.b + 1) * (std::max(args.call.sq, args.call.sk) / kRowTile + 1) +
                           args.call.sequences <
                       INT32_MAX,
               kUnsupported, "q", "q has too many rows or heads for one call");
  backward_portable(args, context);
}

constexpr Variant<AttentionBackward> kVariants[] = {
    {"sm90_wgmma", declines_wgmma, run_wgmma},
    {"sm80_simt", declines_portable, run_portable},
};

void run(const AttentionBackward& op, CudaContext& context) {
  if (op.q.shape[2] > 0) return run_variants(kVariants, op, context);
  for (const Tensor& sum : {op.dk, op.dv, op.dbias})
    if (sum.data)
      HEDDLE_CUDA(cudaMemsetAsync(sum.data, 0, static_cast<size_t>(sum.size()) * size_of(sum.dtype),
                                  context.stream));
}

HEDDLE_REGISTER(AttentionBackward);
HEDDLE_EXPLAIN(AttentionBackward, kVariants);

}  // namespace
}  // namespace heddle
