#include "attention/forward_sm90.cuh"

#include "attention_check.h"
#include "variant.h"

namespace heddle {
namespace {

#ifndef HEDDLE_DV
#define HEDDLE_DV HEDDLE_D
#endif
constexpr int kDv = HEDDLE_DV;

const Case kCases[] = {
    {.b = 1, .sq = 1, .sk = 1, .hq = 1, .hk = 1},
    {.b = 1, .sq = 1, .sk = 3, .hq = 1, .hk = 1, .causal = true},
    {.b = 1, .sq = 65, .sk = 127, .hq = 2, .hk = 1, .processors = 2},
    {.b = 1, .sq = 193, .sk = 193, .hq = 1, .hk = 1, .causal = true, .narrower = 8},
    {.b = 2, .sq = 70, .sk = 257, .hq = 2, .hk = 1, .causal = true, .mapped = true},
    {.b = 1, .sq = 130, .sk = 61, .hq = 1, .hk = 1, .causal = true, .sink = true, .processors = 2},
    {.b = 1, .sq = 129, .sk = 353, .hq = 2, .hk = 2, .mapped = true, .narrower = 24},
    {.b = 1, .sq = 385, .sk = 390, .hq = 1, .hk = 1, .causal = true},
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
};

}  // namespace
}  // namespace heddle

int main(int argc, char** argv) {
  using namespace heddle;
  return check_all<kType>(kCases, kD, kDv, argc, argv, [](const Case& c, SplitCall& call) {
    c.mapped ? launch_forward_sm90<kType, kD, kDv, Form::kMapped>(call, nullptr)
             : launch_forward_sm90<kType, kD, kDv, Form::kPlain>(call, nullptr);
  });
}
