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
    // scores of neighbouring rows are so far from each other that weights are, or are not, relative
    // to the same
    {.b = 1, .sq = 200, .sk = 700, .hq = 2, .hk = 1, .spread = 12, .slots = {.sloped = true}},
    {.b = 1,
     .sq = 150,
     .sk = 700,
     .hq = 2,
     .hk = 1,
     .causal = true,
     .spread = kType == DType::kF16 ? 9 : 16,
     .slots = {.sloped = true}},
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
     .sq = 20,
     .sk = 300,
     .hq = 1,
     .hk = 1,
     .causal = true,
     .infinite = 280,
     .slots = {.bias = BiasForm::kPairs, .bias_dtype = kType, .hidden = 150, .low = -INFINITY}},
    // all keys are hidden
    {.b = 1,
     .sq = 20,
     .sk = 300,
     .hq = 1,
     .hk = 1,
     .slots = {.bias = BiasForm::kPairs, .bias_dtype = kType, .hidden = 300, .low = -2e9f}},
    {.b = 1,
     .sq = 20,
     .sk = 300,
     .hq = 1,
     .hk = 1,
     .sink = true,
     .slots = {.bias = BiasForm::kSingles, .hidden = 300, .low = -2e9f}},
    {.b = 1,
     .sq = 20,
     .sk = 140,
     .hq = 1,
     .hk = 1,
     .slots = {.weights = kSoftplus, .shift = -2e9f}},
    {.b = 1,
     .sq = 150,
     .sk = 500,
     .hq = 1,
     .hk = 1,
     .causal = true,
     .slots = {.bias = BiasForm::kPairs, .bias_dtype = kType, .tilt = 0.5f}},
    // biases that rise behind tiles in which no maximum was news
    {.b = 2,
     .sq = 150,
     .sk = 900,
     .hq = 2,
     .hk = 1,
     .causal = true,
     .narrower = 24,
     .slots = {.bias = BiasForm::kPairs, .bias_dtype = kType, .tilt = 100, .every = 300}},
    {.b = 2,
     .sq = 20,
     .sk = 800,
     .hq = 2,
     .hk = 2,
     .cached = {800, 655},
     .slots = {.bias = BiasForm::kPairs, .bias_dtype = kType, .tilt = 40, .every = 300}},
    {.b = 1,
     .sq = 20,
     .sk = 500,
     .hq = 2,
     .hk = 1,
     .slots = {.bias = BiasForm::kPairs, .bias_dtype = kType, .hidden = 300, .low = -1000}},
    {.b = 1,
     .sq = 20,
     .sk = 500,
     .hq = 1,
     .hk = 1,
     .poisoned = 20,
     .slots = {.bias = BiasForm::kPairs, .bias_dtype = kType, .hidden = 300, .low = -INFINITY}},
    // the last tiles hide keys, whatever the first ones are
    {.b = 1,
     .sq = 80,
     .sk = 500,
     .hq = 1,
     .hk = 1,
     .sink = true,
     .slots = {.bias = BiasForm::kPairs, .bias_dtype = kType, .hidden = -150}},
    {.b = 1,
     .sq = 20,
     .sk = 500,
     .hq = 1,
     .hk = 1,
     .window = 450,
     .slots = {.bias = BiasForm::kPairs, .bias_dtype = kType, .hidden = -150, .low = -INFINITY}},
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
    // of which none is, beside the highest
    {.b = 1,
     .sq = 40,
     .sk = 600,
     .hq = 1,
     .hk = 1,
     .causal = true,
     .slots = {.weights = kReweighted, .power = 15, .length_scale = 115, .cosine = true}},
    // of which nothing makes zeros of what is no number
    {.b = 1,
     .sq = 20,
     .sk = 300,
     .hq = 1,
     .hk = 1,
     .causal = true,
     .poisoned = 290,
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
    // several tiles of the first pass
    {.b = 1,
     .sq = 300,
     .sk = 500,
     .hq = 2,
     .hk = 1,
     .causal = true,
     .processors = 1,
     .slots = {.weights = kReweighted, .power = 15, .length_scale = 40, .cosine = true}},
    {.b = 2,
     .sq = 70,
     .sk = 275,
     .hq = 2,
     .hk = 2,
     .window = 100,
     .slots = {.weights = kReweighted, .power = 3, .length_scale = 20, .cosine = true}},
    {.b = 3,
     .sq = 20,
     .sk = 300,
     .hq = 2,
     .hk = 1,
     .causal = true,
     .cached = {300, 20, 131},
     .slots = {.weights = kReweighted, .power = 15, .length_scale = 40, .cosine = true}},
    // of which one is no number
    {.b = 1,
     .sq = 300,
     .sk = 300,
     .hq = 2,
     .hk = 1,
     .causal = true,
     .poisoned = 3,
     .slots = {.weights = kReweighted, .power = 15, .length_scale = 40, .cosine = true}},
    // a query that is none either, and sees no key
    {.b = 1,
     .sq = 40,
     .sk = 30,
     .hq = 2,
     .hk = 1,
     .causal = true,
     .lost = 5,
     .slots = {.weights = kReweighted, .power = 15, .length_scale = 40, .cosine = true}},
    // equal keys: nothing is above the mean
    {.b = 1,
     .sq = 128,
     .sk = 256,
     .hq = 2,
     .hk = 1,
     .scale = 1,
     .noise = 1e-30f,
     .slots = {.weights = kReweighted, .power = 15, .length_scale = 10, .cosine = true}},
    // keys that differ by a fiftieth
    {.b = 2,
     .sq = 100,
     .sk = 500,
     .hq = 4,
     .hk = 2,
     .causal = true,
     .noise = 0.02f,
     .slots = {.weights = kReweighted, .power = 15, .length_scale = 4.85f, .cosine = true}},
    // whose weights are too large to be multiplied
    {.b = 1,
     .sq = 70,
     .sk = 400,
     .hq = 2,
     .hk = 1,
     .causal = true,
     .narrower = 120,
     .slots = {.weights = kReweighted, .power = 15, .length_scale = 30, .cosine = true}},
    {.b = 1,
     .sq = 70,
     .sk = 200,
     .hq = 2,
     .hk = 1,
     .causal = true,
     .slots = {.weights = kSoftplus, .length_scale = 30, .cosine = true}},
};

void write_rows(FactorArgs q, FactorArgs k, int strange = 0) {
  q.strange = k.strange = &strange;
  emulator::launch(5, 128, 0, [&] { attention_factor_kernel<kType>(q, k, 3); });
  if (strange) emulator::fault("an ordinary row is said to be strange");
}

// What row_factors does on a GPU
void write_lengths(const ForwardCall& call) {
  FactorArgs q = q_rows(call), k = k_rows(call);
  q.factor_row = call.slots.q_row;
  k.factor_row = call.slots.k_row;
  q.factors = const_cast<float*>(call.slots.q_factors);
  k.factors = const_cast<float*>(call.slots.k_factors);
  write_rows(q, k);
}

// Both passes of re-weighting, as run_passes has them
void launch_passes(const ForwardCall& call) {
  const auto lines = static_cast<size_t>(call.b * call.hq * call.sq);
  const auto heads = static_cast<size_t>(call.b * call.hk), d = static_cast<size_t>(call.d);
  std::vector<uint16_t> q(lines * d + 8, 0x7fff);
  std::vector<uint16_t> k(heads * static_cast<size_t>(call.sk) * d + 8, 0x7fff);
  const auto begin = [](std::vector<uint16_t>& units) {
    return units.data() + (-reinterpret_cast<uintptr_t>(units.data()) / 2 & 7);
  };
  std::vector<float> centers(heads * d, NAN), level(lines, NAN), peaks(level), shifts(level);
  const CosineRows rows{begin(q), begin(k), shifts.data(), centers.data()};
  int strange = 1;
  FactorArgs keys = k_units(call, rows);
  keys.strange = &strange;
  emulator::launch(static_cast<int>(heads), kCenterThreads, 0,
                   [&] { attention_center_kernel<kType>(keys); });
  write_rows(q_units(call, rows), keys, strange);
  const Passes passes(call, rows, level.data(), peaks.data());
  launch_sums_sm90<DType::kF16, true>(passes.sums, nullptr);
  launch_forward_sm90<kType, kD, kSlotColumns, Form::kReweighted>(passes.rest, nullptr);
}

template <int kColumns> void launch(const ForwardCall& call) {
  if constexpr (kColumns == 0) {
    launch_sums_sm90<kType, false>(call, nullptr);
  } else if (takes_units(call)) {
    launch_passes(call);
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
    if (call.slots.cosine) write_lengths(call);
    launch<kDv>(call);
  });
}
