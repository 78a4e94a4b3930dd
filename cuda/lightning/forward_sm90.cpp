#include "lightning/forward_sm90.h"

#include <algorithm>

namespace heddle {
namespace {

constexpr int64_t kChunk = 64;

int64_t parts_of(int64_t size, int64_t part) { return (size + part - 1) / part; }

// Rows of S that a kernel has for d
int64_t rows_for(int64_t d) { return d <= 64 ? 64 : parts_of(d, 64) * 64; }

// What a tensor map can describe
bool addressable(const void* data, const ScanStrides& strides, int64_t b, int64_t s, int64_t h,
                 int64_t d) {
  const auto fits = [](int64_t size, int64_t stride) {
    return size == 1 || (stride > 0 && stride % 8 == 0 && stride < int64_t{1} << 39);
  };
  return d % 8 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && fits(b, strides.batch) &&
         fits(s, strides.row) && fits(h, strides.head);
}

// Of one sequence
int64_t tokens_of(const ScanCall& call) {
  return call.cu_seqlens ? call.s / std::max<int64_t>(call.sequences, 1) : call.s;
}

template <DType kType> void pick(const ScanCall& call, const ScanPlan& plan, cudaStream_t stream) {
  switch (plan.rows) {
    case 64:
      return launch_scan_sm90<kType, 64, 64>(call, plan, stream);
    case 128:
      return plan.columns == 128 ? launch_scan_sm90<kType, 128, 128>(call, plan, stream)
                                 : launch_scan_sm90<kType, 128, 64>(call, plan, stream);
    case 192:
      return launch_scan_sm90<kType, 192, 64>(call, plan, stream);
    default:
      return launch_scan_sm90<kType, 256, 64>(call, plan, stream);
  }
}

}  // namespace

int64_t ScanPlan::most_segments(const ScanCall& call, int64_t ctas, int64_t shortest) {
  return std::max<int64_t>(
      std::min(call.processors / std::max<int64_t>(ctas, 1), tokens_of(call) / shortest), 1);
}

// A CTA works through its segment one chunk after the other, so the time is that of the longest
// segment once every multiprocessor has one. Segments read k and v twice: worth it where most of
// the chip has nothing to do otherwise, or where what a second reading costs is little beside the
// chain of chunks. None is shorter than the summaries before it take to read.
int64_t ScanPlan::segments_for(const ScanCall& call, int64_t ctas) {
  const int64_t segments = most_segments(call, ctas, 8 * kChunk);
  return tokens_of(call) < (segments >= 4 ? 4096 : 16384) ? 1 : segments;
}

void ScanPlan::cut(const ScanCall& call, int64_t segments_each) {
  if (segments_each <= 1) {
    segments = 1;
    segment = static_cast<int>((call.s / kChunk + 1) * kChunk);
    slots = call.sequences;
    return;
  }
  cut_every(call, parts_of(parts_of(tokens_of(call), segments_each), kChunk) * kChunk);
}

void ScanPlan::cut_every(const ScanCall& call, int64_t tokens) {
  segment = static_cast<int>(tokens);
  segments = static_cast<int>(parts_of(call.cu_seqlens ? call.s : tokens_of(call), segment));
  slots = call.cu_seqlens ? call.s / segment + call.sequences : call.sequences * segments;
  summed = call.cu_seqlens ? slots : slots - call.sequences;
}

ScanPlan plan_scan_sm90(const ScanCall& call) {
  const int64_t states = call.heads * call.sequences, tokens = tokens_of(call);
  ScanPlan plan{};
  plan.rows = static_cast<int>(rows_for(call.d));
  // S has registers for 128 by 128 numbers
  const bool wide = plan.rows == 128 && call.e > 64;
  plan.columns = wide ? 128 : 64;
  int64_t ctas = states * parts_of(call.e, plan.columns);
  int64_t segments = ScanPlan::segments_for(call, ctas);
  // Halves of e read q and k twice, mostly from L2, and are through a chunk in less time than whole
  // rows: better than twice as many segments, whose keys are read twice from memory. Not where they
  // leave more of the chip empty, nor where segments are so long that products cost more than the
  // end of the summaries, which one pass has not: much later where that fills the chip.
  if (wide && 2 * ctas <= call.processors && call.schedule == 0) {
    constexpr int64_t kShortest = 4 * kChunk;
    const int64_t whole = ScanPlan::most_segments(call, ctas, kShortest);
    const int64_t halves = ScanPlan::most_segments(call, 2 * ctas, kShortest);
    const int64_t alone = 5 * ctas < 2 * call.processors ? 8192 : 32768;
    const int64_t most = halves > 1 ? 4096 * halves : alone;
    if ((2 * halves >= whole || tokens < 4096) && tokens <= most) {
      plan.columns = 64;
      ctas = states * parts_of(call.e, plan.columns);
      segments = tokens < (halves >= 4 ? 1024 : 2048) ? 1 : halves;
    } else {
      segments = whole;
    }
  }
  plan.slices = static_cast<int>(parts_of(call.e, plan.columns));
  plan.parts = 1;
  // What the caller chose holds for a sequence in whatever batch
  if (call.schedule != 0) {
    constexpr int64_t kSegment = 16 * kChunk;
    call.schedule == 2 && call.s > kSegment ? plan.cut_every(call, kSegment) : plan.cut(call, 1);
    return plan;
  }
  // Summaries are of one segment less, so there is room for more than one CTA to each. More than
  // one round of CTAs is worth it where the decay ends before the segment in some heads alone,
  // whose places the others take. Every part is one more for the scan to read.
  while (segments > 1) {
    const int64_t shared = tokens / (2 * plan.parts * segments) / kChunk;  // chunks of a CTA
    const double rounds = shared >= 32 && shared < 128      ? 3
                          : shared >= 16 && plan.parts == 1 ? 1.5
                          : shared >= 8                     ? 1
                                                            : 0;
    if (2 * plan.parts * ctas * (segments - 1) > rounds * call.processors) break;
    plan.parts *= 2;
  }
  plan.cut(call, segments);
  return plan;
}

const char* declines_scan_sm90(const ScanCall& call) {
  constexpr int64_t kMost = int64_t{1} << 30;  // tokens and CTAs are counted in 32 bits
  constexpr int64_t kFewTokens = 16;
  if (call.dtype != DType::kF16 && call.dtype != DType::kBF16)
    return "dtype must be float16 or bfloat16";
  if (call.heads < 1 || call.sequences < 1) return "q must not be empty";
  if (call.s < kFewTokens) return "q must have at least 16 tokens";
  // a slot per 64 tokens and sequence, at most four slices, few parts
  if (call.s > kMost || call.heads > kMost / 32 ||
      call.s / kChunk + 1 > kMost / 32 / call.heads / std::max<int64_t>(call.sequences, 1))
    return "q must have at most 2^30 tokens and CTAs";
  const int64_t row = call.heads * call.e;
  if (!addressable(call.q, call.q_strides, call.b, call.s, call.hq, call.d) ||
      !addressable(call.k, call.k_strides, call.b, call.s, call.hk, call.d) ||
      !addressable(call.v, call.v_strides, call.b, call.s, call.hv, call.e) ||
      !addressable(call.out, {call.s * row, row, call.e}, call.b, call.s, call.heads, call.e))
    return "d, e and strides must be multiples of 8, tensors start at a multiple of 16 bytes";
  return nullptr;
}

void scan_sm90(const ScanCall& call, const ScanPlan& plan, cudaStream_t stream) {
  call.dtype == DType::kF16 ? pick<DType::kF16>(call, plan, stream)
                            : pick<DType::kBF16>(call, plan, stream);
}

}  // namespace heddle
