#include "attention/factors_sm90.cuh"
#include "attention/sums_sm90.cuh"

#include "attention_check.h"

namespace heddle {
namespace {

#ifndef HEDDLE_DV
#define HEDDLE_DV kSlotColumns
#endif
#ifndef HEDDLE_DTYPE
#define HEDDLE_DTYPE kBF16
#endif
constexpr int kD = kSlotColumns, kDv = HEDDLE_DV;
constexpr DType kType = DType::HEDDLE_DTYPE;
constexpr auto kSigmoid = Attention::kSigmoid, kRelu = Attention::kRelu,
               kSoftplus = Attention::kSoftplus, kReweighted = Attention::kReweighted;

// Each of the weights as it usually is and far from there, each form of bias, and what scores are
// multiplied by, with whatever else a call may have
const Case kCases[] = {
    {.b = 2, .sq = 65, .sk = 190, .hq = 2, .hk = 1, .causal = true, .slots = {.sloped = true}},
    {.b = 1,
     .sq = 150,
     .sk = 300,
     .hq = 1,
     .hk = 1,
     .causal = true,
     .slots = {.weights = kSigmoid, .normalise = false, .shift = -6}},
    {.b = 1,
     .sq = 70,
     .sk = 257,
     .hq = 2,
     .hk = 1,
     .window = 100,
     .slots = {.weights = kSigmoid, .normalise = false, .sloped = true, .shift = -40}},
    {.b = 1,
     .sq = 70,
     .sk = 270,
     .hq = 2,
     .hk = 1,
     .causal = true,
     .poisoned = 262,
     .slots = {.weights = kSigmoid, .normalise = false, .shift = 2}},
    // all that a row sees weighs 1, and what it does not see still nothing
    {.b = 1,
     .sq = 70,
     .sk = 200,
     .hq = 1,
     .hk = 1,
     .causal = true,
     .slots = {.weights = kSigmoid, .normalise = false, .shift = INFINITY}},
    {.b = 1,
     .sq = 200,
     .sk = 300,
     .hq = 2,
     .hk = 1,
     .window = 90,
     .sink = true,
     .poisoned = 290,
     .slots = {.sloped = true}},
    {.b = 1,
     .sq = 140,
     .sk = 300,
     .hq = 2,
     .hk = 1,
     .causal = true,
     .processors = 2,
     .poisoned = 280,
     .slots = {.bias = BiasForm::kPairs, .bias_dtype = kType}},
    {.b = 1,
     .sq = 70,
     .sk = 300,
     .hq = 2,
     .hk = 1,
     .slots = {.bias = BiasForm::kPairs, .bias_dtype = kType, .hidden = 150}},
    // the first tile hides its keys as masks that are added do
    {.b = 1,
     .sq = 20,
     .sk = 300,
     .hq = 1,
     .hk = 1,
     .slots = {.bias = BiasForm::kPairs, .bias_dtype = kType, .hidden = 150, .low = -3e4f}},
    {.b = 1,
     .sq = 20,
     .sk = 300,
     .hq = 1,
     .hk = 1,
     .slots = {.bias = BiasForm::kPairs, .bias_dtype = kType, .hidden = 150, .low = -1e9f}},
    {.b = 1,
     .sq = 20,
     .sk = 300,
     .hq = 1,
     .hk = 1,
     .slots = {.bias = BiasForm::kPairs, .bias_dtype = kType, .hidden = 150, .low = -1e30f}},
    {.b = 1,
     .sq = 150,
     .sk = 500,
     .hq = 1,
     .hk = 1,
     .causal = true,
     .slots = {.bias = BiasForm::kPairs, .bias_dtype = kType, .tilt = 0.5f}},
    {.b = 3,
     .sq = 20,
     .sk = 300,
     .hq = 2,
     .hk = 1,
     .cached = {300, 20, 131},
     .slots = {.bias = BiasForm::kPairs, .bias_dtype = kType}},
    {.b = 1,
     .sq = 215,
     .sk = 275,
     .hq = 2,
     .hk = 1,
     .causal = true,
     .packed = {{70, 1}, {0, 130}, {5, 0}, {129, 129}, {11, 15}},
     .processors = 2,
     .slots = {.sloped = true}},
    {.b = 1,
     .sq = 70,
     .sk = 400,
     .hq = 2,
     .hk = 1,
     .causal = true,
     .poisoned = 390,
     .slots = {.weights = kReweighted, .power = 3, .length_scale = 2, .cosine = true}},
    {.b = 1,
     .sq = 70,
     .sk = 140,
     .hq = 1,
     .hk = 1,
     .causal = true,
     .poisoned = 75,
     .slots = {.weights = kSigmoid, .sloped = true, .shift = -30}},
    {.b = 1,
     .sq = 40,
     .sk = 200,
     .hq = 2,
     .hk = 2,
     .causal = true,
     .poisoned = 170,
     .slots = {.weights = kRelu, .normalise = false, .power = 3}},
    {.b = 1,
     .sq = 130,
     .sk = 61,
     .hq = 1,
     .hk = 1,
     .causal = true,
     .mapped = true,
     .narrower = 8,
     .slots = {.weights = kRelu, .power = 1, .bias = BiasForm::kSingles}},
    {.b = 1,
     .sq = 150,
     .sk = 280,
     .hq = 1,
     .hk = 1,
     .causal = true,
     .sink = true,
     .slots = {.weights = kSoftplus}},
    {.b = 1,
     .sq = 66,
     .sk = 260,
     .hq = 1,
     .hk = 1,
     .window = 140,
     .slots = {.weights = kSoftplus, .normalise = false, .shift = -3}},
    {.b = 1,
     .sq = 66,
     .sk = 300,
     .hq = 1,
     .hk = 1,
     .causal = true,
     .poisoned = 250,
     .slots = {.weights = kSoftplus, .shift = -200}},
    {.b = 1,
     .sq = 20,
     .sk = 300,
     .hq = 1,
     .hk = 1,
     .slots = {.weights = kSoftplus, .normalise = false, .shift = 500}},
    {.b = 1,
     .sq = 20,
     .sk = 190,
     .hq = 1,
     .hk = 1,
     .causal = true,
     .slots = {.weights = kSoftplus, .shift = -14}},
    {.b = 2,
     .sq = 100,
     .sk = 200,
     .hq = 2,
     .hk = 1,
     .causal = true,
     .narrower = 24,
     .processors = 2,
     .slots = {.bias = BiasForm::kPairs, .bias_dtype = DType::kBF16}},
    {.b = 2,
     .sq = 70,
     .sk = 150,
     .hq = 2,
     .hk = 1,
     .window = 60,
     .sink = true,
     .slots =
         {.sloped = true, .bias = BiasForm::kPairs, .bias_dtype = DType::kF16, .shared = true}},
    {.b = 1,
     .sq = 70,
     .sk = 201,
     .hq = 2,
     .hk = 1,
     .slots = {.weights = kSigmoid,
               .normalise = false,
               .bias = BiasForm::kSingles,
               .bias_dtype = DType::kBF16}},
    {.b = 1,
     .sq = 140,
     .sk = 152,
     .hq = 2,
     .hk = 1,
     .causal = true,
     .poisoned = 151,
     .slots = {.cosine = true, .bias = BiasForm::kSingles, .bias_dtype = DType::kF16}},
    // rows that see three keys or fewer, and rows that see none
    {.b = 1,
     .sq = 200,
     .sk = 190,
     .hq = 2,
     .hk = 1,
     .causal = true,
     .slots = {.weights = kReweighted, .power = 15, .length_scale = 4.8f, .cosine = true}},
    // scores of which two terms of softplus are enough
    {.b = 1,
     .sq = 40,
     .sk = 600,
     .hq = 1,
     .hk = 1,
     .causal = true,
     .slots = {.weights = kReweighted, .power = 15, .length_scale = 65, .cosine = true}},
    {.b = 1,
     .sq = 70,
     .sk = 270,
     .hq = 1,
     .hk = 1,
     .window = 90,
     .sink = true,
     .slots = {.weights = kReweighted, .power = 2.5f, .offset = 0.5f}},
    // a mean that is far from 1, above and below it
    {.b = 1,
     .sq = 20,
     .sk = 160,
     .hq = 1,
     .hk = 1,
     .causal = true,
     .poisoned = 155,
     .slots = {.weights = kReweighted, .power = 3, .shift = -50}},
    {.b = 1,
     .sq = 20,
     .sk = 160,
     .hq = 1,
     .hk = 1,
     .causal = true,
     .slots = {.weights = kReweighted, .power = 5, .shift = 3}},
    {.b = 1,
     .sq = 215,
     .sk = 275,
     .hq = 2,
     .hk = 1,
     .causal = true,
     .packed = {{70, 1}, {0, 130}, {5, 0}, {129, 129}, {11, 15}},
     .processors = 2,
     .slots = {.weights = kReweighted, .power = 15, .length_scale = 4, .cosine = true}},
    {.b = 3,
     .sq = 20,
     .sk = 300,
     .hq = 2,
     .hk = 1,
     .cached = {300, 20, 131},
     .slots = {.weights = kSoftplus, .length_scale = 0.4f}},
};

// What row_factors does on a GPU
void write_factors(const SplitCall& call) {
  const auto write = [&](const void* x, const Strides& strides, int64_t s, int64_t h,
                         const float* factors, int64_t row) {
    int strange = 0;
    const int lanes = static_cast<int>(std::bit_ceil(static_cast<uint64_t>(call.d / 8)));
    const FactorArgs args{static_cast<const uint16_t*>(x),
                          strides,
                          s,
                          h,
                          call.b * s * h,
                          static_cast<int>(call.d),
                          lanes,
                          const_cast<float*>(factors),
                          row,
                          &strange};
    emulator::launch(2, 128, 0, [&] { attention_factor_kernel<kType>(args); });
    if (strange) emulator::fault("an ordinary row is said to be strange");
  };
  write(call.q, call.q_strides, call.sq, call.hq, call.slots.q_factors, call.slots.q_row);
  write(call.k, call.k_strides, call.sk, call.hk, call.slots.k_factors, call.slots.k_row);
}

template <int kColumns> void launch(const ForwardCall& call) {
  if constexpr (kColumns == 0) {
    const bool cosines = call.slots.weights == Attention::kSoftplus && takes_cosines(call);
    cosines ? launch_sums_sm90<kType, true>(call, nullptr)
            : launch_sums_sm90<kType, false>(call, nullptr);
  } else {
    // scores of no slots are another program's
    dispatch_form(call, [&]<Form kForm>() {
      constexpr Form kTaken = kForm == Form::kPlain ? Form::kMapped : kForm;
      launch_forward_sm90<kType, kD, kSlotColumns, kTaken>(call, nullptr);
    });
  }
}

}  // namespace
}  // namespace heddle

int main(int argc, char** argv) {
  using namespace heddle;
  return check_all<kType>(kCases, kD, kDv, argc, argv, [](const Case&, SplitCall& call) {
    if (call.slots.cosine) write_factors(call);
    launch<kDv>(call);
  });
}
