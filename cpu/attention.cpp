#include "cpu/attention.h"

#include <numeric>

#include "core/cpu_context.h"
#include "core/registry.h"
#include "cpu/attention_row.h"
#include "cpu/attention_tile.h"

// out = softmax(score(q, k)) v, one pass over the keys. Rows are cut into parts, longest first;
// where there are fewer parts than threads, as in decoding, keys are cut as well and the splits are
// joined at the end.
//
// lse is the natural log of the normaliser, the sink included: merge is then right if one of its
// parts has the sink.
namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {
namespace attention {
namespace {

// Rows of a part: panels that share the loading of keys, as many as leave q and acc in the second
// level of cache and every thread several parts to take
template <class T> int64_t rows_per_part(const Problem<T>& problem, int threads) {
  const Tensor& q = problem.op.q;
  const int64_t rows = q.shape[0] * q.shape[1] * q.shape[2];
  const int64_t panels =
      std::min<int64_t>(768 / std::max(problem.d, problem.dv), rows / (kTileCols * threads * 8));
  return kTileCols * std::max<int64_t>(panels, 1);
}

template <class T>
std::vector<Part> make_parts(const Problem<T>& problem, const std::vector<Sequence>& sequences,
                             int64_t part_rows, int threads) {
  std::vector<Part> parts;
  for (const Sequence& sequence : sequences)
    for (int64_t head = 0; head < problem.op.k.shape[2]; ++head)
      for (int64_t row = 0, rows = sequence.sq * problem.group; row < rows; row += part_rows) {
        Part part{&sequence, head, row, std::min(part_rows, rows - row), {}, 0, 1};
        // Bounds never descend from one query to the next
        part.keys = {problem.visible(sequence, problem.query_of(part, 0)).begin,
                     problem.visible(sequence, problem.query_of(part, part.rows - 1)).end};
        parts.push_back(part);
      }

  // Splits of less than this cost more than they gain
  constexpr int64_t kLeast = 4 * kTileKeys;
  const int64_t wanted =
      parts.empty() ? 1 : (2 * threads - 1) / static_cast<int64_t>(parts.size()) + 1;
  std::vector<Part> splits;
  for (Part part : parts) {
    const Range keys = part.keys;
    const int64_t count = keys.end - keys.begin;
    // With few rows heads take turns over short runs of keys, as these lie in the same pages
    const int64_t runs = part.rows <= RowKernel<T>::kMaxRows ? count / (2 * kLeast) : 1;
    part.splits = static_cast<int>(std::clamp<int64_t>(count / kLeast, 1, std::max(wanted, runs)));
    for (part.split = 0; part.split < part.splits; ++part.split) {
      part.keys = {keys.begin + count * part.split / part.splits,
                   keys.begin + count * (part.split + 1) / part.splits};
      splits.push_back(part);
    }
  }
  return splits;
}

// Divides and writes the rows of a part whose splits lie one after the other
template <class T> void finish(const Problem<T>& problem, const Part& part, float* states) {
  const Attention& op = problem.op;
  const int64_t dv = problem.dv, batch = part.sequence->batch;
  const float scale = Problem<T>::scale_of(op.v_scale, part.head);
  float line[256];
  for (int64_t row = 0; row < part.rows; ++row) {
    const auto split_state = [&](int split) {
      return State::at(states + static_cast<size_t>(split) * State::floats(part.rows, dv),
                       part.rows, dv);
    };
    float row_max = -FLT_MAX, row_sum = 0;
    for (int split = 0; split < part.splits; ++split)
      row_max = std::max(row_max, split_state(split).row_max[row]);
    std::fill_n(line, dv, 0.f);
    for (int split = 0; split < part.splits; ++split) {
      const State state = split_state(split);
      const float weight = std::exp2(state.row_max[row] - row_max);
      row_sum += weight * state.row_sum[row];
      for (int64_t e = 0; e < dv; ++e) line[e] += weight * state.acc[row * dv + e];
    }
    const bool empty = row_sum == 0;
    for (int64_t e = 0; e < dv; ++e)
      line[e] = empty ? 0.f : scale * (op.normalise ? line[e] / row_sum : line[e]);

    const int64_t query = part.sequence->q_begin + problem.query_of(part, row),
                  head = problem.head_of(part, row);
    dispatch_float(op.out.dtype, [&]<class O>(O) {
      store_row(op.out.as<O>() + batch * op.out.strides[0] + query * op.out.strides[1] +
                    head * op.out.strides[2],
                op.out.strides[3], line, dv);
    });
    op.lse.as<float>()[batch * op.lse.strides[0] + head * op.lse.strides[1] +
                       query * op.lse.strides[2]] =
        empty ? -INFINITY
              : static_cast<float>(row_max * kLn2 + std::log(static_cast<double>(row_sum)));
  }
}

template <class T> void run_typed(const Attention& op, CpuContext& context) {
  const Problem<T> problem{op};
  const std::vector<Sequence> sequences = find_sequences(op);
  const int64_t part_rows = rows_per_part(problem, context.threads());
  const std::vector<Part> parts = make_parts(problem, sequences, part_rows, context.threads());
  std::vector<size_t> order(parts.size());
  std::iota(order.begin(), order.end(), size_t{0});
  // Head after head while there are parts enough, so that its keys stay in the cache
  const bool plenty = parts.size() >= 8 * static_cast<size_t>(context.threads());
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    const Part &x = parts[a], &y = parts[b];
    if (plenty && x.sequence != y.sequence) return x.sequence < y.sequence;
    if (plenty && x.split != y.split) return x.split < y.split;
    if (plenty && x.head != y.head) return x.head < y.head;
    return x.cost() > y.cost();
  });

  // Splits must outlive their part; otherwise every worker has one state
  int64_t most_rows = 0;
  size_t all_states = 0;
  bool split = false;
  std::vector<size_t> state_at;
  for (const Part& part : parts) {
    most_rows = std::max(most_rows, part.rows);
    split |= part.splits > 1;
    state_at.push_back(all_states);
    all_states += State::floats(part.rows, problem.dv);
  }
  const size_t workers = static_cast<size_t>(context.threads());
  const size_t state_floats = State::floats(most_rows, problem.dv);
  const size_t work_floats =
      std::max(TileKernel<T, RunKeys<T>>::floats(most_rows, problem.d, problem.dv),
               RowKernel<T>::floats(problem.d, problem.dv));
  const Scratch<float> states(split ? all_states : workers * state_floats),
      work(workers * work_floats);

  context.parallel(static_cast<int64_t>(parts.size()), [&](int64_t turn, int worker) {
    const size_t index = order[static_cast<size_t>(turn)];
    const Part& part = parts[index];
    float* memory = work.data() + static_cast<size_t>(worker) * work_floats;
    float* result =
        states.data() + (split ? state_at[index] : static_cast<size_t>(worker) * state_floats);
    const State state = State::at(result, part.rows, problem.dv);
    if (op.masked) {
      TileKernel<T, MaskKeys<T>>(problem, part, memory).run(state);
    } else if (part.rows <= RowKernel<T>::kMaxRows) {
      RowKernel<T>(problem, part, memory).run(state);
    } else {
      TileKernel<T, RunKeys<T>>(problem, part, memory).run(state);
    }
    if (!split) finish(problem, part, result);
  });
  if (!split) return;
  context.parallel(static_cast<int64_t>(parts.size()), [&](int64_t index, int) {
    const Part& part = parts[static_cast<size_t>(index)];
    if (part.split == 0)
      finish(problem, part, states.data() + state_at[static_cast<size_t>(index)]);
  });
}

void run(const Attention& op, CpuContext& context) {
  HEDDLE_CHECK(!op.recent_k, kUnsupported, "recentK", "only a GPU gathers keys");
  if (op.lse.size() == 0) return;
  if (op.finds_level()) {
    const Scratch<float> level(static_cast<size_t>(op.lse.size()));
    const Attention rest = op.with_level(level.data());
    run(rest.sums(), context);
    return run(rest, context);
  }
  if (op.q.dtype == DType::kE4M3) return run_typed<E4M3>(op, context);
  dispatch_float(op.q.dtype, [&]<class T>(T) { run_typed<T>(op, context); });
}

HEDDLE_REGISTER(Attention);

}  // namespace
}  // namespace attention
}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
