#include "common/variants.h"
#include "core/slot.h"
#include "lightning/decode_portable.cuh"
#include "lightning/scan_portable.cuh"

namespace heddle {
namespace {

DecodeCall call_of(const LightningDecode& op) {
  const LightningHeads heads(op.q, op.k, op.v, op.slopes);
  const auto small = [](int64_t x) { return static_cast<int>(x); };
  const auto rows = [&](const Tensor& x) {
    return DecodeRows{x.data,
                      {x.strides[0], x.strides[1], x.strides[2], x.strides[3]},
                      small(heads.out / x.shape[2])};
  };
  DecodeCall call{};
  call.q = rows(op.q);
  call.k = rows(op.k);
  call.v = rows(op.v);
  call.slopes = op.slopes.as<float>();
  call.slopes_stride = op.slopes.strides[0];
  call.states = op.states.as<float>();
  call.slots = op.slots.as<int32_t>();
  call.slots_stride = op.slots.strides[0];
  call.batch = op.q.shape[0];
  call.pool = static_cast<int>(std::min<int64_t>(op.states.shape[0], INT32_MAX));  // as slots are
  call.out = op.out.data;
  call.all_states = op.all_states ? op.all_states.as<float>() : nullptr;
  call.heads = small(heads.out);
  call.heads_state = small(heads.states);
  call.tokens = small(op.q.shape[1]);
  call.d = small(op.q.shape[3]);
  call.e = small(op.v.shape[3]);
  call.scale = static_cast<float>(op.scale);
  call.transposed = op.state_layout == 1;
  call.vectors = op.states.shape[3] % 4 == 0 && reinterpret_cast<uintptr_t>(call.states) % 16 == 0;
  return call;
}

constexpr const char* kFault =
    "slots must be below the size of the pool, and slopes finite and at least 0";

const char* declines_hopper(const LightningDecode& op, const CudaContext& context) {
  if (context.arch != 90) return "the GPU must be of compute capability 9.0";
  constexpr int64_t kMostRows = 65535;  // of a grid
  const DecodeCall call = call_of(op);
  if (call.d != 128 || call.e != 128) return "d and e must be 128";
  if (call.tokens != 1) return "s must be 1";
  if (call.all_states) return "states must not be output per token";
  if (call.heads != call.heads_state || call.q.share * call.k.share * call.v.share != 1)
    return "q, k, v and states must have as many heads";
  if (!call.vectors) return "states must start at a multiple of 16 bytes";
  if (call.batch > kMostRows) return "q must have at most 65,535 rows";
  return nullptr;
}

void run_hopper(const LightningDecode& op, CudaContext& context) {
  DecodeCall call = call_of(op);
  call.fault = context.verdict(kFault);
  dispatch_float(op.q.dtype, [&]<class T>(T) { launch_decode_sm90<T>(call, context.stream); });
  context.launched("lightning_decode_sm90_kernel");
}

const char* declines_portable(const LightningDecode&, const CudaContext&) { return nullptr; }

void run_portable(const LightningDecode& op, CudaContext& context) {
  DecodeCall call = call_of(op);
  const int64_t ctas = call.batch * call.heads_state * ((call.e + kDecodeSlab - 1) / kDecodeSlab);
  HEDDLE_CHECK(ctas < INT32_MAX, kUnsupported, "q", "q has too many rows for one call");
  call.fault = context.verdict(kFault);
  dispatch_float(op.q.dtype, [&]<class T>(T) {
    const auto pick = [&]<int kPieces, bool kVectors>() {
      return call.transposed ? lightning_decode_kernel<T, kPieces, true, kVectors>
                             : lightning_decode_kernel<T, kPieces, false, kVectors>;
    };
    auto* kernel = !call.vectors   ? pick.template operator()<16, false>()
                   : call.d <= 128 ? pick.template operator()<8, true>()
                                   : pick.template operator()<16, true>();
    kernel<<<static_cast<unsigned>(ctas), kTileThreads, 0, context.stream>>>(call);
  });
  context.launched("lightning_decode_kernel");
}

constexpr Variant<LightningDecode> kVariants[] = {
    {"sm90_simt", declines_hopper, run_hopper},
    {"sm80_simt", declines_portable, run_portable},
};

void run(const LightningDecode& op, CudaContext& context) {
  if (op.out.size() > 0) run_variants(kVariants, op, context);
}

HEDDLE_REGISTER(LightningDecode);
HEDDLE_EXPLAIN(LightningDecode, kVariants);

}  // namespace
}  // namespace heddle
