#include "attention/forward_sm90.cuh"

#include "attention_check.h"
#include "variant.h"

namespace heddle {
namespace {

#ifndef HEDDLE_DV
#define HEDDLE_DV HEDDLE_D
#endif
constexpr int kDv = HEDDLE_DV;
#ifndef HEDDLE_LAYOUT
#define HEDDLE_LAYOUT kEven
#endif
constexpr Layout kLayout = Layout::HEDDLE_LAYOUT;

const Case kCases[] = {
    {.b = 1, .sq = 1, .sk = 1, .hq = 1, .hk = 1},
    {.b = 1, .sq = 1, .sk = 3, .hq = 1, .hk = 1, .causal = true},
    {.b = 1, .sq = 65, .sk = 127, .hq = 2, .hk = 1, .processors = 2},
    {.b = 1, .sq = 193, .sk = 193, .hq = 1, .hk = 1, .causal = true, .narrower = 8},
    {.b = 2, .sq = 70, .sk = 257, .hq = 2, .hk = 1, .causal = true, .mapped = true},
    {.b = 1, .sq = 130, .sk = 61, .hq = 1, .hk = 1, .causal = true, .sink = true, .processors = 2},
    {.b = 1, .sq = 129, .sk = 353, .hq = 2, .hk = 2, .mapped = true, .narrower = 24},
    {.b = 1, .sq = 385, .sk = 390, .hq = 1, .hk = 1, .causal = true},
    {.b = 1, .sq = 200, .sk = 265, .hq = 1, .hk = 1, .causal = true},
    {.b = 1, .sq = 192, .sk = 225, .hq = 1, .hk = 1, .causal = true},
    {.b = 1, .sq = 200, .sk = 400, .hq = 1, .hk = 1, .window = 138},
    {.b = 1, .sq = 200, .sk = 600, .hq = 1, .hk = 1, .window = 150, .sink = true},
    {.b = 1, .sq = 18, .sk = 21, .hq = 1, .hk = 1, .causal = true, .poisoned = 13},
    {.b = 1,
     .sq = 30,
     .sk = 30,
     .hq = 1,
     .hk = 1,
     .window = 5,
     .mapped = true,
     .narrower = 8,
     .poisoned = 9},
    {.b = 1,
     .sq = 215,
     .sk = 275,
     .hq = 2,
     .hk = 1,
     .causal = true,
     .packed = {{70, 1}, {0, 130}, {5, 0}, {129, 129}, {11, 15}},
     .processors = 2},
    {.b = 3, .sq = 20, .sk = 300, .hq = 2, .hk = 1, .cached = {300, 20, 131}},
    {.b = 1, .sq = 400, .sk = 400, .hq = 2, .hk = 1, .window = 256},
    {.b = 2, .sq = 261, .sk = 450, .hq = 1, .hk = 1, .window = 192, .sink = true, .processors = 2},
    {.b = 1, .sq = 300, .sk = 261, .hq = 1, .hk = 1, .window = 70, .narrower = 8, .poisoned = 100},
    {.b = 2, .sq = 150, .sk = 500, .hq = 2, .hk = 2, .window = 128, .cached = {500, 170}},
    {.b = 1,
     .sq = 430,
     .sk = 640,
     .hq = 2,
     .hk = 1,
     .window = 130,
     .packed = {{150, 300}, {0, 40}, {10, 3}, {270, 297}},
     .processors = 2},
    {.b = 1, .sq = 200, .sk = 900, .hq = 2, .hk = 1, .spread = steep(kType)},
    // values that are large beside weights that are, and a row of no numbers
    {.b = 1,
     .sq = 200,
     .sk = 900,
     .hq = 1,
     .hk = 1,
     .causal = true,
     .lost = 20,
     .spread = steep(kType) * 0.8f,
     .values = kType == DType::kF16 ? 1e3f : 1e26f},
    {.b = 2,
     .sq = 450,
     .sk = 700,
     .hq = 1,
     .hk = 1,
     .causal = true,
     .narrower = 8,
     .spread = steep(kType)},
    {.b = 1,
     .sq = 500,
     .sk = 700,
     .hq = 2,
     .hk = 1,
     .causal = true,
     .packed = {{70, 300}, {0, 10}, {193, 193}, {230, 180}},
     .processors = 2,
     .spread = steep(kType)},
};

}  // namespace
}  // namespace heddle

int main(int argc, char** argv) {
  using namespace heddle;
  return check_all<kType>(kCases, kD, kDv, argc, argv, [](const Case& c, SplitCall& call) {
    if (c.mapped) return launch_forward_sm90<kType, kD, kDv, Form::kMapped>(call, nullptr);
    c.window ? launch_forward_sm90<kType, kD, kDv, Form::kPlain>(call, nullptr)
             : launch_forward_sm90<kType, kD, kDv, Form::kPlain, kLayout>(call, nullptr);
  });
}
