#include "attention/forward_sm90.cuh"
#include "attention/split_sm90.cuh"
#include "attention_check.h"
#include "variant.h"

// Long prompts over pages, and short sequences that are packed with them
namespace heddle {
namespace {

const Case kCases[] = {
    {.b = 1, .sq = 1, .sk = 64, .hq = 1, .hk = 1, .cached = {1}, .page_size = 64},
    {.b = 2,
     .sq = 130,
     .sk = 320,
     .hq = 4,
     .hk = 2,
     .causal = true,
     .cached = {300, 257},
     .processors = 3,
     .page_size = 64},
    {.b = 1,
     .sq = 200,
     .sk = 400,
     .hq = 1,
     .hk = 1,
     .window = 138,
     .cached = {391},
     .page_size = 16},
    {.b = 3,
     .sq = 70,
     .sk = 512,
     .hq = 2,
     .hk = 1,
     .sink = true,
     .narrower = 8,
     .cached = {300, 0, 131},
     .page_size = 256},
    {.b = 1,
     .sq = 193,
     .sk = 200,
     .hq = 1,
     .hk = 1,
     .causal = true,
     .narrower = 24,
     .cached = {193},
     .page_size = 8},
    // fewer keys than rows, and a key that is no number, which some rows see
    {.b = 1,
     .sq = 261,
     .sk = 256,
     .hq = 2,
     .hk = 2,
     .causal = true,
     .cached = {140},
     .poisoned = 100,
     .page_size = 128},
    {.b = 1,
     .sq = 300,
     .sk = 320,
     .hq = 1,
     .hk = 1,
     .window = 70,
     .cached = {310},
     .poisoned = 100,
     .page_size = 32},
    // scores that keep rising, for which products are made again
    {.b = 1,
     .sq = 200,
     .sk = 1504,
     .hq = 2,
     .hk = 1,
     .causal = true,
     .cached = {1500},
     .page_size = 32,
     .spread = steep(kType)},
    {.b = 1,
     .sq = 674,
     .sk = 384,
     .hq = 4,
     .hk = 2,
     .causal = true,
     .packed = {{1, 300}, {200, 384}, {97, 97}, {0, 10}, {96, 40}, {150, 0}, {130, 131}},
     .processors = 5,
     .page_size = 64},
    {.b = 1,
     .sq = 430,
     .sk = 640,
     .hq = 2,
     .hk = 1,
     .window = 130,
     .packed = {{150, 300}, {0, 40}, {10, 3}, {270, 297}},
     .processors = 2,
     .poisoned = 200,
     .page_size = 16},
    // prompts behind more short sequences than lanes
    {.b = 1,
     .sq = 334,
     .sk = 256,
     .hq = 2,
     .hk = 1,
     .causal = true,
     .packed =
         [] {
           std::vector<Sequence> all(34, {1, 20});
           all.insert(all.begin() + 5, {130, 200});
           all.push_back({170, 256});
           return all;
         }(),
     .processors = 3,
     .page_size = 32},
    {.b = 1,
     .sq = 300,
     .sk = 128,
     .hq = 1,
     .hk = 1,
     .sink = true,
     .packed = {{100, 128}, {100, 1}, {100, 77}},
     .page_size = 128},
};

}  // namespace
}  // namespace heddle

int main(int argc, char** argv) {
  using namespace heddle;
  return check_all<kType>(kCases, kD, kD, argc, argv, [](const Case&, SplitCall& call) {
    launch_forward_sm90<kType, kD, kD, Form::kPlain, Layout::kPaged>(call, nullptr);
    if (!call.cu_seqlens_q) return;
    call.most_queries = kFewQueries;
    launch_split_sm90<kType, kD>(call, nullptr);
  });
}
