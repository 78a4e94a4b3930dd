#include "ops/linear.h"

#include <algorithm>

#include "core/cpu_context.h"
#include "core/registry.h"
#include "cpu/half.h"
#include "cpu/multiply.h"

// out[m, o] = sum over i of x[m, i] weight[o, i] + bias[o], in f32.
//
// Few rows: dot products with the weight as it stands, whose reading is what takes the time.
// Many rows: the weight is turned into panels of kTileCols outputs by i, a share of it at a time,
// and tiles of kTileRows rows run over a panel with x read one number at a time.
namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {
namespace {

// Turning the weight costs as much as this many rows of dot products lose
constexpr int64_t kMaxDotRows = 16;
// A group is what a thread multiplies at a time, kDepth of i after kDepth: its panels stay in the
// second level of cache
constexpr int64_t kGroupPanels = 4, kGroupRows = 96, kDepth = 512;
constexpr int64_t kPackedFloats = 1 << 20;  // of the weight at a time, if i allows

// Rows of [..., n], however its leading dimensions lie
struct Rows {
  const Tensor& tensor;
  int64_t count = 1, width = tensor.shape[tensor.rank - 1],
          element = tensor.strides[tensor.rank - 1];
  explicit Rows(const Tensor& tensor) : tensor(tensor) {
    for (int dim = 0; dim + 1 < tensor.rank; ++dim) count *= tensor.shape[dim];
  }
  int64_t offset(int64_t row) const {
    int64_t at = 0;
    for (int dim = tensor.rank - 2; dim >= 0; row /= tensor.shape[dim--])
      at += row % tensor.shape[dim] * tensor.strides[dim];
    return at;
  }
};

template <class T> struct Problem {
  const Linear& op;
  const Rows x{op.x}, out{op.out};
  const int64_t depth = x.width, outputs = out.width;

  const T* x_row(int64_t m) const { return op.x.as<T>() + x.offset(m); }
  const T* weight_row(int64_t o) const { return op.weight.as<T>() + o * op.weight.strides[0]; }
  float bias(int64_t o) const {
    return op.bias ? to_float(op.bias.as<T>()[o * op.bias.strides[0]]) : 0.f;
  }
  void write(int64_t m, int64_t o, const float* from, int64_t count) const {
    dispatch_float(op.out.dtype, [&]<class U>(U) {
      store_row(op.out.as<U>() + out.offset(m) + o * out.element, out.element, from, count);
    });
  }
};

// sums[r, o] = x[r, :] . weight[o, :]
template <int R, int O, class T>
void dots(float* sums, int64_t sums_width, const float* x, int64_t x_width, const T* weight,
          int64_t weight_width, int64_t depth) {
  Vec acc[R][O] = {};
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    Vec line[R];
    for (int r = 0; r < R; ++r) line[r] = load(x + r * x_width + k);
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) {
      const Vec w = load(weight + o * weight_width + k);
      for (int r = 0; r < R; ++r) acc[r][o] += line[r] * w;
    }
  }
  if (k < depth)
    for (int o = 0; o < O; ++o) {
      const Vec w = load(weight + o * weight_width + k, depth - k);
      for (int r = 0; r < R; ++r) acc[r][o] += load(x + r * x_width + k, depth - k) * w;
    }
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o) sums[r * sums_width + o] = reduce_add(acc[r][o]);
}

constexpr int kDotRows = 4, kDotOutputs = kRegisters == 32 ? 6 : 2;

// The same for any number of rows and outputs; one row takes more outputs, for more reads in flight
template <class T>
void all_dots(float* sums, int64_t outputs, const float* x, int64_t rows, const T* weight,
              int64_t weight_width, int64_t depth) {
  const auto cover = [&]<int R, int O>(int64_t r, std::integer_sequence<int, R, O>) {
    int64_t o = 0;
    for (; o + O <= outputs; o += O)
      dots<R, O>(sums + r * outputs + o, outputs, x + r * depth, depth, weight + o * weight_width,
                 weight_width, depth);
    for (; o < outputs; ++o)
      dots<R, 1>(sums + r * outputs + o, outputs, x + r * depth, depth, weight + o * weight_width,
                 weight_width, depth);
  };
  int64_t r = 0;
  for (; r + kDotRows <= rows; r += kDotRows)
    cover(r, std::integer_sequence<int, kDotRows, kDotOutputs>());
  for (; r + 2 <= rows; r += 2) cover(r, std::integer_sequence<int, 2, kDotOutputs>());
  for (; r < rows; ++r) cover(r, std::integer_sequence<int, 1, 8>());
}

template <class T> void run_few_rows(const Problem<T>& problem, CpuContext& context) {
  const int64_t rows = problem.x.count, depth = problem.depth, outputs = problem.outputs;
  // Enough for every thread, none so small that handing it out shows
  const int64_t most = std::max<int64_t>(rows * outputs * depth >> 16, 1);
  const int64_t parts = std::min<int64_t>({most, 4 * context.threads(), outputs});
  const int64_t share = ((outputs + parts - 1) / parts + 7) / 8 * 8;
  const bool dense = problem.op.weight.strides[1] == 1;

  const Scratch<float> x(static_cast<size_t>(rows * depth));
  for (int64_t m = 0; m < rows; ++m)
    load_row(x.data() + m * depth, problem.x_row(m), problem.x.element, depth);

  context.parallel((outputs + share - 1) / share, [&](int64_t part, int) {
    const int64_t first = part * share, count = std::min(share, outputs - first);
    const Scratch<float> sums(static_cast<size_t>(rows * count));
    if (dense) {
      all_dots(sums.data(), count, x.data(), rows, problem.weight_row(first),
               problem.op.weight.strides[0], depth);
    } else {
      const Scratch<float> weight(static_cast<size_t>(count * depth));
      for (int64_t o = 0; o < count; ++o)
        load_row(weight.data() + o * depth, problem.weight_row(first + o),
                 problem.op.weight.strides[1], depth);
      all_dots(sums.data(), count, x.data(), rows, weight.data(), depth, depth);
    }
    for (int64_t m = 0; m < rows; ++m) {
      float* line = sums.data() + m * count;
      for (int64_t o = 0; o < count; ++o) line[o] += problem.bias(first + o);
      problem.write(m, first, line, count);
    }
  });
}

// panel[i, lane] = weight[first + lane, i], with zeros past the last output
template <class T> void pack_panel(const Problem<T>& problem, int64_t first, float* panel) {
  const Tensor& weight = problem.op.weight;
  const int64_t count = std::min<int64_t>(kTileCols, problem.outputs - first);
  if (count < kTileCols) std::fill_n(panel, problem.depth * kTileCols, 0.f);
  if constexpr (std::is_same_v<T, float>) {
    if (weight.strides[1] == 1)
      return transpose(panel, kTileCols, problem.weight_row(first), weight.strides[0], count,
                       problem.depth);
  }
  constexpr int64_t kStep = 256;
  alignas(64) float lines[kTileCols * kStep];
  for (int64_t k = 0; k < problem.depth; k += kStep) {
    const int64_t depth = std::min(kStep, problem.depth - k);
    for (int64_t o = 0; o < count; ++o)
      load_row(lines + o * kStep, problem.weight_row(first + o) + k * weight.strides[1],
               weight.strides[1], depth);
    transpose(panel + k * kTileCols, kTileCols, lines, kStep, count, depth);
  }
}

template <int R, int N>
void multiply_tile(float* sums, int64_t sums_width, const float* x, int64_t x_width,
                   const float* panel, int64_t depth) {
  Tile<R, N> acc;
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) acc.at[r][n] = load(sums + r * sums_width + n * kLanes);
  multiply(acc, depth, x, x_width, 1, panel, kTileCols);
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) store(sums + r * sums_width + n * kLanes, acc.at[r][n]);
}

// Rows in tiles of R, the rest in tiles of half as many
template <int R>
void multiply_group(float* sums, int64_t columns, const float* x, int64_t x_width, int64_t rows,
                    const float* panels, int64_t panel_floats, int64_t depth) {
  constexpr int64_t width = kGroupPanels * kTileCols;
  for (; rows >= R; rows -= R, sums += R * width, x += R * x_width)
    for (int64_t column = 0; column < columns; column += kTileCols) {
      const float* panel = panels + column / kTileCols * panel_floats;
      const int64_t vecs = std::min<int64_t>((columns - column + kLanes - 1) / kLanes, kTileVecs);
      if (vecs == 3) multiply_tile<R, 3>(sums + column, width, x, x_width, panel, depth);
      if (vecs == 2) multiply_tile<R, 2>(sums + column, width, x, x_width, panel, depth);
      if (vecs == 1) multiply_tile<R, 1>(sums + column, width, x, x_width, panel, depth);
    }
  if constexpr (R > 1) {
    if (rows > 0)
      multiply_group<R / 2>(sums, columns, x, x_width, rows, panels, panel_floats, depth);
  }
}

template <class T> void run_many_rows(const Problem<T>& problem, CpuContext& context) {
  const int64_t rows = problem.x.count, depth = problem.depth, outputs = problem.outputs;
  constexpr int64_t kWidth = kGroupPanels * kTileCols;
  const int64_t panel_floats = depth * kTileCols;
  const int64_t all_panels = (outputs + kTileCols - 1) / kTileCols;
  const int64_t least = kGroupPanels * context.threads();
  const int64_t round =
      std::min(all_panels, std::max(kPackedFloats / std::max<int64_t>(panel_floats, 1), least));
  const Scratch<float> packed(static_cast<size_t>(round * panel_floats));
  const size_t work_floats = static_cast<size_t>(kGroupRows * (kWidth + kDepth));
  const Scratch<float> work(static_cast<size_t>(context.threads()) * work_floats);
  const int64_t row_groups = (rows + kGroupRows - 1) / kGroupRows;

  for (int64_t first = 0; first < all_panels; first += round) {
    const int64_t panels = std::min(round, all_panels - first);
    context.parallel(panels, [&](int64_t panel, int) {
      pack_panel(problem, (first + panel) * kTileCols, packed.data() + panel * panel_floats);
    });
    const int64_t panel_groups = (panels + kGroupPanels - 1) / kGroupPanels;
    context.parallel(row_groups * panel_groups, [&](int64_t index, int worker) {
      // Groups as even as they can be
      const int64_t row_group = index / panel_groups, panel_group = index % panel_groups;
      const int64_t m = rows * row_group / row_groups, m_end = rows * (row_group + 1) / row_groups;
      const int64_t p = panels * panel_group / panel_groups,
                    p_end = panels * (panel_group + 1) / panel_groups;
      const int64_t column = (first + p) * kTileCols;
      const int64_t columns = std::min((first + p_end) * kTileCols, outputs) - column;

      float* sums = work.data() + static_cast<size_t>(worker) * work_floats;
      float* lines = sums + kGroupRows * kWidth;
      for (int64_t o = 0; o < columns; ++o) sums[o] = problem.bias(column + o);
      for (int64_t r = 1; r < m_end - m; ++r) std::copy_n(sums, columns, sums + r * kWidth);
      for (int64_t k = 0; k < depth; k += kDepth) {
        const int64_t step = std::min(kDepth, depth - k);
        for (int64_t r = 0; r < m_end - m; ++r)
          load_row(lines + r * kDepth, problem.x_row(m + r) + k * problem.x.element,
                   problem.x.element, step);
        multiply_group<kTileRows>(sums, columns, lines, kDepth, m_end - m,
                                  packed.data() + p * panel_floats + k * kTileCols, panel_floats,
                                  step);
      }
      for (int64_t r = 0; r < m_end - m; ++r)
        problem.write(m + r, column, sums + r * kWidth, columns);
    });
  }
}

void run(const Linear& op, CpuContext& context) {
  if (op.out.size() == 0) return;
  dispatch_float(op.x.dtype, [&]<class T>(T) {
    const Problem<T> problem{op};
    if (problem.x.count <= kMaxDotRows) {
      run_few_rows(problem, context);
    } else {
      run_many_rows(problem, context);
    }
  });
}

HEDDLE_REGISTER(Linear);

}  // namespace
}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
