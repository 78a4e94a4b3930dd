#include "attention/split_sm90.cuh"

#include <utility>

#include "attention_check.h"
#include "variant.h"

namespace heddle {
namespace {

#ifndef HEDDLE_OUT
#define HEDDLE_OUT kF16
#endif

const Case kCases[] = {
    {.b = 1, .sq = 1, .sk = 1, .hq = 1, .hk = 1},
    {.b = 2, .sq = 1, .sk = 300, .hq = 4, .hk = 2, .causal = true, .processors = 5},
    {.b = 1, .sq = 1, .sk = 2600, .hq = 1, .hk = 1, .processors = 20},
    // parts that are read twice, by a weight of zero
    {.b = 1,
     .sq = 1,
     .sk = 500,
     .hq = 1,
     .hk = 1,
     .processors = 3,
     .infinite = kType == DType::kE4M3 ? -1 : 499},
    // heads of float8 of their own scales
    {.b = 2,
     .sq = 2,
     .sk = 300,
     .hq = 4,
     .hk = 2,
     .causal = true,
     .processors = 5,
     .scaled = kType == DType::kE4M3},
    {.b = 1,
     .sq = 3,
     .sk = 200,
     .hq = 6,
     .hk = 2,
     .causal = true,
     .mapped = true,
     .sink = true,
     .cached = {190},
     .processors = 2,
     .poisoned = 188,
     .page_size = 32,
     .scaled = kType == DType::kE4M3},
    {.b = 1, .sq = 1, .sk = 700, .hq = 3, .hk = 1, .mapped = true, .sink = true},
    {.b = 1,
     .sq = 4,
     .sk = 390,
     .hq = 4,
     .hk = 2,
     .causal = true,
     .narrower = kType == DType::kE4M3 ? 16 : 8,
     .processors = 4},
    {.b = 1, .sq = 3, .sk = 500, .hq = 2, .hk = 1, .window = 140, .processors = 2},
    {.b = 1, .sq = 5, .sk = 3, .hq = 1, .hk = 1, .causal = true, .processors = 2},
    // rows without keys in the second part, whose masked value is no number, and in any part
    {.b = 1,
     .sq = 64,
     .sk = 140,
     .hq = 1,
     .hk = 1,
     .causal = true,
     .processors = 2,
     .poisoned = 138},
    {.b = 1,
     .sq = 160,
     .sk = 192,
     .hq = 1,
     .hk = 1,
     .causal = true,
     .cached = {132},
     .processors = 5,
     .page_size = 64},
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
    // prompts and single tokens at once, more of them than lanes, some without queries or keys
    {.b = 1,
     .sq = 83,
     .sk = 384,
     .hq = 4,
     .hk = 2,
     .causal = true,
     .packed = {{1, 300}, {0, 128}, {70, 384}, {1, 1}, {5, 3}, {2, 0}, {1, 129}, {3, 17}},
     .processors = 9,
     .page_size = 64},
    {.b = 1,
     .sq = 180,
     .sk = 256,
     .hq = 2,
     .hk = 1,
     .sink = true,
     .packed = {{80, 200}, {100, 0}, {0, 0}},
     .processors = 3,
     .page_size = 128},
    {.b = 1,
     .sq = 300,
     .sk = 320,
     .hq = 2,
     .hk = 1,
     .window = 70,
     .mapped = true,
     .packed = {{100, 320}, {200, 210}},
     .processors = 5,
     .page_size = 16},
    {.b = 1,
     .sq = 40,
     .sk = 64,
     .hq = 1,
     .hk = 1,
     .causal = true,
     .packed = std::vector<Sequence>(40, {1, 33}),
     .processors = 7,
     .page_size = 32},
    {.b = 1, .sq = 0, .sk = 64, .hq = 1, .hk = 1, .packed = {{0, 9}, {0, 0}}, .page_size = 64},
    // many rows, of several CTAs
    {.b = 2,
     .sq = 16,
     .sk = 700,
     .hq = 4,
     .hk = 1,
     .causal = true,
     .sink = true,
     .narrower = 16,
     .processors = 9},
    {.b = 1, .sq = 30, .sk = 1500, .hq = 2, .hk = 1, .window = 1300, .processors = 11},
    {.b = 1,
     .sq = 9,
     .sk = 700,
     .hq = 7,
     .hk = 1,
     .causal = true,
     .processors = 5,
     .poisoned = 699},
    // and few beside them, in places of their own
    {.b = 3, .sq = 33, .sk = 260, .hq = 4, .hk = 2, .narrower = 32, .processors = 54},
    // rows of tiles that see little, which others have begun
    {.b = 1,
     .sq = 640,
     .sk = 640,
     .hq = 1,
     .hk = 1,
     .causal = true,
     .cached = {640},
     .processors = 13,
     .poisoned = 638,
     .page_size = 64},
};

}  // namespace
}  // namespace heddle

int main(int argc, char** argv) {
  using namespace heddle;
  constexpr bool kFloat8 = kType == DType::kE4M3;
  constexpr DType kOut = kFloat8 ? DType::HEDDLE_OUT : kType;
  return check_all<kType, kOut>(kCases, kD, kD, argc, argv, [](const Case& c, SplitCall& call) {
    int verdict = -1, judged = 0;
    const auto judge = [&](SplitCall its, int expected) {
      launch_split_sm90<kFloat8 ? DType::kF16 : kType, kD, kFloat8>(its, nullptr);
      if (its.verdict && (verdict != expected || judged != 0))
        emulator::fault("the verdict on lengths and pages is wrong");
    };
    if (call.cache_seqlens && !c.window) {
      call.verdict = &verdict;
      call.judged = &judged;
      SplitCall wrong = call;
      std::vector<uint16_t> out(static_cast<size_t>(c.b * call.out_strides.batch));
      std::vector<float> lse(static_cast<size_t>(c.b * c.hq * c.sq));
      wrong.out = out.data();
      wrong.lse = lse.data();
      const auto judge_with = [&](const int32_t* word, int64_t value) {
        auto* its = const_cast<int32_t*>(word);
        const int32_t right = std::exchange(*its, static_cast<int32_t>(value));
        judge(wrong, 1);
        *its = right;
      };
      judge_with(call.cache_seqlens, call.sk + 1);
      if (call.cu_seqlens_q) {
        judge_with(call.cu_seqlens_q + call.sequences, c.sq + 1);
        constexpr uint16_t kUntouched = 0x7fff;
        std::ranges::fill(out, kUntouched);
        judge_with(call.cu_seqlens_q + 1, c.sq + 1);
        const bool overlap = call.sequences > 1 && call.cu_seqlens_q[2] < c.sq;
        if (overlap && std::ranges::count(out, kUntouched) != std::ssize(out))
          emulator::fault("sequences that overlap have results");
      }
      // the last page that is looked at
      const int64_t count = call.cu_seqlens_q ? call.sequences : c.b;
      int64_t last = count - 1;
      while (last >= 0 &&
             (call.cache_seqlens[last] == 0 ||
              (call.cu_seqlens_q && call.cu_seqlens_q[last] == call.cu_seqlens_q[last + 1])))
        --last;
      if (call.block_table && last >= 0)
        judge_with(call.block_table + last * call.table_row +
                       (call.cache_seqlens[last] - 1) / c.page_size * call.table_column,
                   call.pages);
    }
    judge(call, 0);
  });
}
