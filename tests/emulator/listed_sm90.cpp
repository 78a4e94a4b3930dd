#include "attention/forward_sm90.cuh"

#include "attention_check.h"
#include "variant.h"

#ifndef HEDDLE_LAYOUT
#define HEDDLE_LAYOUT kListed
#endif

namespace heddle {
namespace {

// q heads and kv heads with lists of their own, shared by a group and shared by all; blocks as
// large as a warpgroup's rows, as a tile, larger and smaller; nothing listed and everything
const Case kCases[] = {
    {.b = 1, .sq = 1, .sk = 1, .hq = 1, .hk = 1, .mask = {128, 128, 1, 100}},
    {.b = 1, .sq = 65, .sk = 127, .hq = 1, .hk = 1, .mask = {64, 64, 1, 0}},
    {.b = 1,
     .sq = 300,
     .sk = 300,
     .hq = 2,
     .hk = 1,
     .causal = true,
     .processors = 2,
     .mask = {128, 128, 2, 50}},
    {.b = 2,
     .sq = 257,
     .sk = 450,
     .hq = 2,
     .hk = 2,
     .causal = true,
     .sink = true,
     .mask = {64, 64, 2, 35}},
    {.b = 1, .sq = 260, .sk = 700, .hq = 4, .hk = 2, .narrower = 24, .mask = {64, 64, 2, 20}},
    {.b = 1,
     .sq = 200,
     .sk = 333,
     .hq = 2,
     .hk = 1,
     .causal = true,
     .mask = {.block_q = 256,
              .block_k = 32,
              .heads = 1,
              .percent = 30,
              .window = 70,
              .sink_tokens = 5}},
    {.b = 1,
     .sq = 150,
     .sk = 410,
     .hq = 2,
     .hk = 2,
     .causal = true,
     .mask =
         {.block_q = 64, .block_k = 64, .heads = 2, .percent = 15, .columns = 3, .diagonals = 2}},
    {.b = 1, .sq = 90, .sk = 190, .hq = 1, .hk = 1, .mask = {48, 16, 1, 10}},
    {.b = 1,
     .sq = 210,
     .sk = 230,
     .hq = 1,
     .hk = 1,
     .causal = true,
     .mask = {.block_q = 128, .block_k = 128, .sink_tokens = 500, .document = 50}},
    {.b = 1,
     .sq = 140,
     .sk = 300,
     .hq = 1,
     .hk = 1,
     .mask = {.block_q = 64, .block_k = 64, .percent = 20, .window = 30}},
    // many tiles that are seen whole, some by one warpgroup alone
    {.b = 1,
     .sq = 140,
     .sk = 1300,
     .hq = 2,
     .hk = 1,
     .causal = true,
     .mask = {.block_q = 128, .block_k = 128, .heads = 2, .percent = 80}},
    {.b = 1, .sq = 128, .sk = 1100, .hq = 1, .hk = 1, .mask = {64, 128, 1, 75}},
    // so many tiles that those of low rows come last
    {.b = 1,
     .sq = 1030,
     .sk = 1030,
     .hq = 2,
     .hk = 1,
     .causal = true,
     .processors = 2,
     .mask = {128, 128, 2, 10}},
    // more than 32 words of 32 units, most of them empty
    {.b = 1, .sq = 3, .sk = 67000, .hq = 1, .hk = 1, .narrower = 56, .mask = {64, 32, 1, 1}},
    // a value that is no number in a tile that is visited for other keys
    {.b = 1,
     .sq = 70,
     .sk = 140,
     .hq = 1,
     .hk = 1,
     .causal = true,
     .poisoned = 100,
     .mask = {.block_q = 16, .block_k = 16, .percent = 40}},
    {.b = 1,
     .sq = 415,
     .sk = 475,
     .hq = 2,
     .hk = 1,
     .causal = true,
     .packed = {{70, 1}, {0, 130}, {5, 0}, {329, 329}, {11, 15}},
     .processors = 2,
     .mask = {.block_q = 64, .block_k = 64, .heads = 2, .percent = 50, .columns = 1}},
    {.b = 3,
     .sq = 20,
     .sk = 300,
     .hq = 2,
     .hk = 1,
     .cached = {300, 20, 131},
     .mask = {64, 64, 1, 60}},
    // the last unit is not in the first tile
    {.b = 3,
     .sq = 130,
     .sk = 450,
     .hq = 2,
     .hk = 2,
     .cached = {430, 261, 131},
     .mask = {64, 64, 2, 50}},
    // runs of distances
    {.b = 1,
     .sq = 150,
     .sk = 333,
     .hq = 1,
     .hk = 1,
     .causal = true,
     .mask = {.block_q = 64, .block_k = 64, .columns = 2, .diagonals = 1500}},
    {.b = 1,
     .sq = 200,
     .sk = 1500,
     .hq = 2,
     .hk = 1,
     .causal = true,
     .mask = {.block_q = 64, .block_k = 64, .heads = 2, .percent = 70},
     .spread = steep(kType)},
    // more keys than L2 has room for, which go up and down in turns
    {.b = 1, .sq = 700, .sk = 900, .hq = 1, .hk = 1, .processors = 2, .mask = {64, 64, 1, 30}},
    // the same words where whole units are listed
    {.b = 1, .sq = 3, .sk = 67000, .hq = 1, .hk = 1, .narrower = 56, .mask = {64, 256, 1, 2}},
};

}  // namespace
}  // namespace heddle

int main(int argc, char** argv) {
  using namespace heddle;
  return check_all<kType>(kCases, kD, kD, argc, argv, [](const Case&, SplitCall& call) {
    call.section_bytes = 300'000;  // of one head, where there are many keys
    if (lists_itself(call)) call.lists.bits = nullptr;
    launch_forward_sm90<kType, kD, kD, Form::kPlain, Layout::HEDDLE_LAYOUT>(call, nullptr);
  });
}
