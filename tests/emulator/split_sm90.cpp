#include "attention/split_sm90.cuh"

#include "attention_check.h"
#include "variant.h"

namespace heddle {
namespace {

const Case kCases[] = {
    {.b = 1, .sq = 1, .sk = 1, .hq = 1, .hk = 1},
    {.b = 2, .sq = 1, .sk = 300, .hq = 4, .hk = 2, .causal = true, .processors = 5},
    {.b = 1, .sq = 1, .sk = 2600, .hq = 1, .hk = 1, .processors = 20},
    {.b = 1, .sq = 1, .sk = 700, .hq = 3, .hk = 1, .mapped = true, .sink = true},
    {.b = 1, .sq = 4, .sk = 390, .hq = 4, .hk = 2, .causal = true, .narrower = 8, .processors = 4},
    {.b = 1, .sq = 3, .sk = 500, .hq = 2, .hk = 1, .window = 140, .processors = 2},
    {.b = 1, .sq = 5, .sk = 3, .hq = 1, .hk = 1, .causal = true, .processors = 2},
    {.b = 4, .sq = 2, .sk = 400, .hq = 2, .hk = 1, .cached = {400, 0, 129, 17}, .processors = 3},
    {.b = 3,
     .sq = 1,
     .sk = 320,
     .hq = 8,
     .hk = 1,
     .causal = true,
     .cached = {300, 1, 257},
     .processors = 4,
     .page_size = 16},
    {.b = 2,
     .sq = 40,
     .sk = 256,
     .hq = 4,
     .hk = 2,
     .causal = true,
     .cached = {250, 70},
     .processors = 7,
     .page_size = 256},
    {.b = 1,
     .sq = 3,
     .sk = 280,
     .hq = 2,
     .hk = 1,
     .causal = true,
     .processors = 2,
     .poisoned = 278},
    {.b = 1,
     .sq = 2,
     .sk = 192,
     .hq = 1,
     .hk = 1,
     .window = 9,
     .cached = {150},
     .poisoned = 140,
     .page_size = 64},
};

}  // namespace
}  // namespace heddle

int main(int argc, char** argv) {
  using namespace heddle;
  return check_all<kType>(kCases, kD, kD, argc, argv, [](const Case&, SplitCall& call) {
    launch_split_sm90<kType, kD>(call, nullptr);
  });
}
