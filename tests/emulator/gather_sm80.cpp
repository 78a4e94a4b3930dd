#include "attention/gather_sm80.cuh"

#include "gather_check.h"
#include "variant.h"

namespace heddle {
namespace {

using T = Element<kType>;

const GatherCase kCases[] = {
    {.sk = 30, .window = 40},
    {.b = 2,
     .sq = 70,
     .sk = 400,
     .hq = 4,
     .hk = 2,
     .lists = 4,
     .block_q = 64,
     .block_k = 2,
     .width = 60},
    {.sq = 20,
     .sk = 330,
     .hq = 6,
     .hk = 2,
     .block_q = 16,
     .window = 30,
     .width = 20,
     .soft_cap = 3},
    {.b = 2,
     .sq = 40,
     .sk = 320,
     .hq = 2,
     .hk = 1,
     .lists = 2,
     .block_q = 32,
     .block_k = 16,
     .sink_tokens = 16,
     .cached = true,
     .page_size = 32},
    {.sk = 700, .hq = 8, .hk = 2, .window = 90, .width = 40, .splits = 3},
    {.b = 2,
     .sq = 5,
     .sk = 500,
     .hq = 4,
     .hk = 2,
     .lists = 2,
     .block_q = 4,
     .block_k = 4,
     .window = 64,
     .sink_tokens = 4,
     .width = 50,
     .cached = true,
     .splits = 4},
    {.sq = 20, .sk = 500, .hq = 4, .hk = 2, .block_q = 16, .window = 30, .width = 30, .splits = 3},
    {.b = 3, .sq = 2, .sk = 90, .hq = 2, .hk = 2, .block_q = 2, .cached = true, .splits = 5},
    // rows see nothing of the first tile, whatever scores are multiplied by
    {.sq = 200,
     .sk = 200,
     .block_q = 64,
     .window = 7,
     .sink_tokens = 0,
     .width = 20,
     .soft_cap = 1e9f},
    // the first row sees a key that it gives no weight, and none of those that are no numbers
    {.sq = 20, .sk = 20, .block_q = 32, .sink_tokens = 0, .poisoned = 13, .hides = true},
    {.sq = 20,
     .sk = 20,
     .block_q = 32,
     .sink_tokens = 0,
     .splits = 2,
     .poisoned = 13,
     .hides = true},
    // some rows of a tile see a key that is no number
    {.sq = 64, .sk = 200, .hq = 2, .block_q = 64, .soft_cap = 3, .poisoned = 150},
    {.b = 2,
     .sq = 16,
     .sk = 300,
     .hq = 4,
     .hk = 2,
     .block_q = 16,
     .window = 9,
     .width = 20,
     .page_size = 32,
     .splits = 3,
     .poisoned = 292},
};

double check(const GatherCase& c, emulator::Random& random) {
  return check_gather<T, kType>(
      c, kD, random, [&](const ForwardArgs& call, const GatherLists& lists) {
        GatherArgs args{};
        args.call = call;
        args.lists = lists;
        const auto grid = plan_gather(args);
        args.splits = c.splits;
        const auto units = static_cast<size_t>(grid.units());
        const size_t sums = units * static_cast<size_t>(c.splits * args.block_q * args.heads);
        std::vector<float> part_out(sums * kD, NAN);
        std::vector<float2> part_state(sums, {NAN, NAN});
        std::vector<int> arrivals(units);
        args.part_out = part_out.data();
        args.part_state = part_state.data();
        args.arrivals = arrivals.data();
        gridDim.y = static_cast<int>(grid.heads);
        for (blockIdx.z = 0; blockIdx.z < c.b; ++blockIdx.z)
          for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
            emulator::launch(static_cast<int>(grid.row_tiles) * c.splits, kGatherThreads,
                             sizeof(GatherSmem<T, kD>) + 16, [&] {
                               char* smem = reinterpret_cast<char*>(emulator::cta->smem());
                               while (reinterpret_cast<uintptr_t>(smem) % 16) ++smem;
                               auto& own = *reinterpret_cast<GatherSmem<T, kD>*>(smem);
                               if (c.splits > 1) return gather_attention<T, kD, true>(args, own);
                               gather_attention<T, kD, false>(args, own);
                             });
        for (const int left : arrivals)
          if (left != 0) emulator::fault("counters are left at zero");
      });
}

}  // namespace
}  // namespace heddle

int main(int argc, char** argv) {
  return heddle::emulator::run_cases(heddle::kCases, argc, argv, heddle::check);
}
