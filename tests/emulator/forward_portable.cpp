// Attention with every option on the emulator, against its definition in float64
#include "portable_check.h"

namespace heddle {
namespace {

#ifndef HEDDLE_DTYPE
#define HEDDLE_DTYPE kBF16
#endif
constexpr DType kType = DType::HEDDLE_DTYPE;
constexpr DType kOut = kType == DType::kE4M3 ? DType::kF16 : kType;
using T = std::conditional_t<kType == DType::kE4M3, E4M3, Element<kType>>;
constexpr int kD = 40, kDv = 72;  // less narrower
constexpr auto kSigmoid = Attention::kSigmoid, kRelu = Attention::kRelu,
               kSoftplus = Attention::kSoftplus, kReweighted = Attention::kReweighted;

// Every option with others that it meets in the kernel, rows and keys that end in the middle of a
// tile, and splits of which some have no key. `processors` are splits.
const Case kCases[] = {
    {.b = 1, .sq = 1, .sk = 1, .hq = 1, .hk = 1},
    {.b = 2, .sq = 33, .sk = 65, .hq = 6, .hk = 2, .causal = true, .sink = true, .scale = -0.3f},
    {.b = 1, .sq = 3, .sk = 200, .hq = 2, .hk = 1, .sink = true, .processors = 9},
    {.b = 1, .sq = 70, .sk = 61, .hq = 1, .hk = 1, .causal = true, .processors = 2},
    {.b = 1,
     .sq = 60,
     .sk = 190,
     .hq = 3,
     .hk = 1,
     .window = 50,
     .mapped = true,
     .processors = 3,
     .poisoned = 150},
    {.b = 1,
     .sq = 105,
     .sk = 139,
     .hq = 2,
     .hk = 1,
     .causal = true,
     .packed = {{33, 1}, {0, 40}, {5, 0}, {64, 64}, {3, 34}},
     .processors = 2,
     .scaled = kType == DType::kE4M3},
    {.b = 3,
     .sq = 2,
     .sk = 96,
     .hq = 2,
     .hk = 1,
     .window = 70,
     .sink = true,
     .cached = {90, 0, 33},
     .processors = 2,
     .poisoned = 88,
     .page_size = 16},
    {.b = 1,
     .sq = 42,
     .sk = 96,
     .hq = 2,
     .hk = 1,
     .causal = true,
     .sink = true,
     .packed = {{1, 90}, {0, 20}, {36, 70}, {2, 0}, {3, 2}},
     .processors = 2,
     .page_size = 16},
    // tiles that no row, and that one row sees
    {.b = 1,
     .sq = 70,
     .sk = 140,
     .hq = 2,
     .hk = 1,
     .causal = true,
     .sink = true,
     .processors = 2,
     .poisoned = 100,
     .mask = {.block_q = 16, .block_k = 16, .percent = 15}},
    {.b = 1,
     .sq = 90,
     .sk = 150,
     .hq = 2,
     .hk = 2,
     .causal = true,
     .mask =
         {.block_q = 64, .block_k = 64, .heads = 2, .percent = 15, .columns = 3, .diagonals = 2}},
    {.b = 1,
     .sq = 77,
     .sk = 106,
     .hq = 2,
     .hk = 1,
     .packed = {{33, 33}, {0, 9}, {44, 64}},
     .mask =
         {.block_q = 16, .block_k = 32, .heads = 2, .percent = 30, .window = 20, .sink_tokens = 5}},
    {.b = 1,
     .sq = 70,
     .sk = 80,
     .hq = 1,
     .hk = 1,
     .causal = true,
     .mask = {.block_q = 64, .block_k = 64, .sink_tokens = 500, .document = 30}},
    {.b = 1,
     .sq = 40,
     .sk = 100,
     .hq = 2,
     .hk = 1,
     .causal = true,
     .processors = 2,
     .slots = {.weights = kSigmoid, .normalise = false, .sloped = true, .shift = -3}},
    {.b = 1,
     .sq = 40,
     .sk = 70,
     .hq = 2,
     .hk = 2,
     .causal = true,
     .poisoned = 60,
     .slots = {.weights = kRelu, .normalise = false, .power = 3}},
    {.b = 1,
     .sq = 20,
     .sk = 90,
     .hq = 1,
     .hk = 1,
     .causal = true,
     .sink = true,
     .processors = 2,
     .slots = {.weights = kSoftplus, .length_scale = 0.4f, .shift = -40}},
    {.b = 2,
     .sq = 40,
     .sk = 77,
     .hq = 2,
     .hk = 1,
     .causal = true,
     .poisoned = 70,
     .slots = {.weights = kReweighted, .power = 15, .length_scale = 4, .cosine = true}},
    {.b = 1,
     .sq = 33,
     .sk = 70,
     .hq = 1,
     .hk = 1,
     .window = 30,
     .sink = true,
     .processors = 2,
     .slots = {.weights = kReweighted, .power = 2.5f, .offset = 0.5f}},
    {.b = 2,
     .sq = 20,
     .sk = 75,
     .hq = 2,
     .hk = 1,
     .processors = 3,
     .slots = {.sloped = true, .bias = BiasForm::kSingles, .bias_dtype = DType::kBF16}},
    {.b = 1,
     .sq = 20,
     .sk = 90,
     .hq = 2,
     .hk = 1,
     .slots = {.bias = BiasForm::kSingles, .shared = true, .hidden = 40}},
    // most tiles see no key
    {.b = 1, .sq = 200, .sk = 20, .hq = 1, .hk = 1, .causal = true, .slots = {.cosine = true}},
    // a weight of 0 is not none
    {.b = 1,
     .sq = 20,
     .sk = 90,
     .hq = 1,
     .hk = 1,
     .causal = true,
     .processors = 2,
     .infinite = 60,
     .slots = {.bias = BiasForm::kSingles, .hidden = 40, .low = -INFINITY}},
    // nor are keys that all are hidden
    {.b = 1,
     .sq = 20,
     .sk = 70,
     .hq = 1,
     .hk = 1,
     .processors = 2,
     .slots = {.bias = BiasForm::kSingles, .hidden = 70, .low = -2e9f}},
    {.b = 1,
     .sq = 20,
     .sk = 70,
     .hq = 1,
     .hk = 1,
     .sink = true,
     .slots = {.weights = kSoftplus, .shift = -2e9f}},
};

// As run_portable has it
void run(const SplitCall& call) {
  ForwardArgs args = args_of(call);
  if (call.block_table) {
    args.block_table = call.block_table;
    args.table_row = call.table_row;
    args.table_column = call.table_column;
    args.pages = call.pages;
    args.page_size = call.page_size;
  }
  // out has no gaps here
  std::vector<uint16_t> out(static_cast<size_t>(call.b * call.sq * call.hq * call.dv), 0x7fff);
  args.out = out.data();
  args.splits = call.processors;
  const auto rows = static_cast<size_t>(call.b * call.hq * call.sq * args.splits);
  std::vector<float> part_out(rows * static_cast<size_t>(call.dv), NAN), part_max(rows, NAN),
      part_sum(rows, NAN);
  if (args.splits > 1) {
    args.part_out = part_out.data();
    args.part_max = part_max.data();
    args.part_sum = part_sum.data();
  }
  const int64_t tiles = tile_count(args);
  CudaContext context;
  // some CTAs take several tiles
  forward_portable<T>(args, call.causal ? (tiles + 1) / 2 : tiles, context);
  for (int64_t i = 0; i < call.b * call.sq * call.hq; ++i)
    std::copy_n(out.data() + i * call.dv, call.dv,
                static_cast<uint16_t*>(call.out) + i / call.hq / call.sq * call.out_strides.batch +
                    i / call.hq % call.sq * call.out_strides.row +
                    i % call.hq * call.out_strides.head);
}

}  // namespace
}  // namespace heddle

int main(int argc, char** argv) {
  using namespace heddle;
  return check_all<kType, kOut>(kCases, kD, kDv, argc, argv,
                                [](const Case&, SplitCall& call) { run(call); });
}
