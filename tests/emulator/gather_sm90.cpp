#include "attention/gather_sm90.cuh"

#include "gather_check.h"
#include "variant.h"

namespace heddle {
namespace {

const GatherCase kCases[] = {
    {.sq = 64, .sk = 70, .hq = 2, .block_q = 64, .window = 70},
    {.b = 2, .sq = 70, .sk = 500, .hq = 8, .hk = 2, .lists = 2, .block_q = 64, .width = 30},
    {.sq = 140,
     .sk = 700,
     .hq = 4,
     .hk = 2,
     .block_q = 128,
     .block_k = 16,
     .window = 61,
     .sink_tokens = 16,
     .width = 20,
     .soft_cap = 3},
    {.sq = 150, .sk = 150, .hq = 2, .block_q = 64, .block_k = 32, .window = 61, .sink_tokens = 64},
    {.sq = 128, .sk = 300, .hq = 2, .block_q = 64, .window = 70, .poisoned = 300 - 64},
    // some rows of a tile see a key that is no number
    {.sq = 100, .sk = 300, .hq = 4, .block_q = 64, .window = 70, .soft_cap = 3, .poisoned = 280},
    {.b = 2, .sq = 64, .sk = 200, .hq = 2, .block_q = 64, .window = 16, .poisoned = 150},
};

double check(const GatherCase& c, emulator::Random& random) {
  return check_gather<Element<kType>, kType>(
      c, kD, random, [&](const ForwardArgs& args, const GatherLists& lists) {
        const auto strides = [](const Heads& x) { return Strides{x.batch, x.token, x.head}; };
        GatherCall call{};
        call.b = c.b;
        call.sq = c.sq;
        call.sk = c.sk;
        call.hq = c.hq;
        call.hk = c.hk;
        call.q = args.q.data;
        call.k = args.k.data;
        call.v = args.v.data;
        call.q_strides = strides(args.q);
        call.k_strides = strides(args.k);
        call.v_strides = strides(args.v);
        call.out = args.out;
        call.out_strides = {c.sq * c.hq * kD, c.hq * kD, kD};
        call.lse = args.lse;
        call.scale = args.scale;
        call.soft_cap = args.soft_cap;
        call.processors = 3;
        call.blocks = lists;
        call.lists.mask = args.mask;
        launch_gather_sm90<kType, kD>(call, nullptr);
      });
}

}  // namespace
}  // namespace heddle

int main(int argc, char** argv) {
  return heddle::emulator::run_cases(heddle::kCases, argc, argv, heddle::check);
}
