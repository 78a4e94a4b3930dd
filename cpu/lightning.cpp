#include "ops/lightning.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/registry.h"
#include "cpu/lightning_backward.h"
#include "cpu/lightning_scan.h"
#include "cpu/lightning_step.h"

namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {
namespace {

double log2_decay(const Tensor& slopes, int64_t head) {
  const float slope = slopes.as<float>()[head * slopes.strides[0]];
  HEDDLE_CHECK(std::isfinite(slope) && slope >= 0, kArgument, "slopes",
               "slopes must be finite and at least 0, got ", slope, " for head ", head);
  return -static_cast<double>(slope) * 1.4426950408889634;
}

// Long ones first
template <class Op> std::vector<ScanSequence> sequences_of(const Op& op) {
  std::vector<ScanSequence> sequences;
  const int64_t tokens = op.q.shape[1];
  if (!op.cu_seqlens) {
    for (int64_t b = 0; b < op.q.shape[0]; ++b) sequences.push_back({b, b, 0, tokens});
    return sequences;
  }
  const Tensor& offsets = op.cu_seqlens;
  const auto at = [&](int64_t i) -> int64_t {
    return offsets.as<int32_t>()[i * offsets.strides[0]];
  };
  const int64_t count = offsets.shape[0] - 1;
  HEDDLE_CHECK(at(0) == 0 && at(count) == tokens, kArgument, "cuSeqlens",
               "cuSeqlens must start at 0 and end at ", tokens, ", got ", at(0), " and ",
               at(count));
  for (int64_t i = 0; i < count; ++i) {
    HEDDLE_CHECK(at(i) <= at(i + 1), kArgument, "cuSeqlens", "cuSeqlens must never descend, got ",
                 at(i + 1), " after ", at(i));
    sequences.push_back({i, 0, at(i), at(i + 1)});
  }
  std::stable_sort(
      sequences.begin(), sequences.end(),
      [](const ScanSequence& a, const ScanSequence& b) { return a.length() > b.length(); });
  return sequences;
}

template <class Op> std::vector<Powers> powers_of(const Op& op) {
  std::vector<Powers> powers;
  for (int64_t head = 0; head < op.slopes.shape[0]; ++head)
    powers.emplace_back(log2_decay(op.slopes, head), op.chunk_size);
  return powers;
}

void run(const Lightning& op, CpuContext& context) {
  const std::vector<ScanSequence> sequences = sequences_of(op);
  const std::vector<Powers> powers = powers_of(op);
  dispatch_float(op.q.dtype, [&]<class T>(T) { Scan<T>(op, sequences, powers, context).run(); });
}

void run(const LightningBackward& op, CpuContext& context) {
  const std::vector<ScanSequence> sequences = sequences_of(op);
  const std::vector<Powers> powers = powers_of(op);
  dispatch_float(op.q.dtype,
                 [&]<class T>(T) { Gradients<T>(op, sequences, powers, context).run(); });
}

std::vector<int64_t> slots_of(const LightningDecode& op) {
  const int64_t pool = op.states.shape[0];
  std::vector<int64_t> slots;
  for (int64_t b = 0; b < op.slots.shape[0]; ++b) {
    slots.push_back(op.slots.as<int32_t>()[b * op.slots.strides[0]]);
    HEDDLE_CHECK(slots.back() < pool, kArgument, "slots", "slots must be below ", pool, ", got ",
                 slots.back());
  }
  std::vector<int64_t> sorted = slots;
  std::sort(sorted.begin(), sorted.end());
  for (size_t i = 1; i < sorted.size(); ++i)
    HEDDLE_CHECK(sorted[i] < 0 || sorted[i] != sorted[i - 1], kArgument, "slots",
                 "slots must name each state at most once, got ", sorted[i], " twice");
  return slots;
}

void run(const LightningDecode& op, CpuContext& context) {
  const int64_t states = op.states.shape[1];
  const std::vector<int64_t> slots = slots_of(op);
  std::vector<float> decays;
  for (int64_t head = 0; head < states; ++head)
    decays.push_back(static_cast<float>(std::exp2(log2_decay(op.slopes, head))));
  // A state of 128 by 128 takes a few microseconds, about as long as waking a thread
  constexpr int64_t kPiece = 1 << 16;
  const int64_t count = static_cast<int64_t>(slots.size()) * states;
  const int64_t work = count * op.q.shape[1] * op.states.shape[2] * op.states.shape[3];
  const int64_t pieces =
      std::min(count, std::clamp<int64_t>(work / kPiece, 1, 4 * context.threads()));
  dispatch_float(op.q.dtype, [&]<class T>(T) {
    context.parallel(pieces, [&](int64_t piece, int) {
      const Step<T> step(op);
      for (int64_t i = count * piece / pieces; i < count * (piece + 1) / pieces; ++i)
        step.run(i / states, i % states, slots[static_cast<size_t>(i / states)],
                 decays[static_cast<size_t>(i % states)]);
    });
  });
}

HEDDLE_REGISTER(Lightning);
HEDDLE_REGISTER(LightningBackward);
HEDDLE_REGISTER(LightningDecode);

}  // namespace
}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
