// similarity_loss on a CPU: a sweep over row chunks. The strip kernels read each chunk's matrices once, and in backward replace
// the student's by its gradient, whose products with the features are the gradients of the features.
#include "sweep.h"
#include "../transposed_sum.h"

#include <cmath>
#include <limits>
#include <tuple>

namespace simplclip {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// Returns the first value of a statistic in rows [6, N] or columns [3, M].
template <class Stat>
float* stat_of(const Tensor& stats, Stat stat) {
  return data<float>(stats) + int64_t(stat) * stats.size(1);
}

// Accumulates column statistics, a log-sum-exp and optionally a mean, from [strips, M] partials to [M].
struct ColumnSums {
  Tensor lse_parts, mean_parts;            // [strips, M]
  float *lse = nullptr, *mean = nullptr;   // [M]

  ColumnSums(const Sweep& sweep, bool has_mean, Scratch& scratch) {
    lse_parts = scratch.take(sweep.call.image, {strips_of(sweep.chunk), sweep.m}, ScalarType::Float);
    if (has_mean) mean_parts = scratch.take(sweep.call.image, {strips_of(sweep.chunk), sweep.m}, ScalarType::Float);
  }

  // Sets the totals' memory; `mean_total` is null if there is no mean.
  void start(float* lse_total, float* mean_total) {
    lse = lse_total;
    mean = mean_total;
    std::fill_n(lse, lse_parts.size(1), -kInf);
    if (mean) std::fill_n(mean, lse_parts.size(1), 0.0f);
  }

  float* lse_of(int64_t strip) const { return data<float>(lse_parts) + strip * lse_parts.size(1); }
  float* mean_of(int64_t strip) const { return data<float>(mean_parts) + strip * lse_parts.size(1); }

  void merge(int64_t strips) const {
    const int64_t m = lse_parts.size(1);
    parallel_for(0, m, 1024, [&](int64_t begin, int64_t end) {
      instruction_set().strip.merge(data<float>(lse_parts) + begin, mean ? data<float>(mean_parts) + begin : nullptr, strips, m,
                            end - begin, lse + begin, mean ? mean + begin : nullptr);
    });
  }
};

// The memory of forward: the sweep, and the column sums that the call needs.
struct Forward {
  Sweep sweep;
  std::optional<ColumnSums> student, teacher;

  Forward(const SimilarityCall& call, Scratch& scratch) : sweep(call, nullptr, scratch) {
    if (call.columns) student.emplace(sweep, false, scratch);
    if (call.columns && call.has_teacher()) teacher.emplace(sweep, true, scratch);
  }
};

// Returns rows [6, N], columns [3, M] and the stored rows of the matrices: see reference.py.
std::tuple<Tensor, Tensor, Tensor> similarity_loss_fwd(const SimilarityCall& call) {
  call.expect_layout();
  Scratch scratch;
  Forward work(call, scratch);
  const Sweep& sweep = work.sweep;

  Tensor row_stats = new_zeros(call.image, {int64_t(RowStat::kCount), sweep.n}, ScalarType::Float);
  Tensor column_stats = new_zeros(call.image, {int64_t(ColumnStat::kCount), sweep.m}, ScalarType::Float);
  auto column = [&](ColumnStat stat) { return stat_of(column_stats, stat); };
  if (work.student) work.student->start(column(ColumnStat::kLseStudent), nullptr);
  if (work.teacher) work.teacher->start(column(ColumnStat::kLseTeacher), column(ColumnStat::kMean));

  sweep.for_chunks([&](int64_t first, int64_t count) {
    sweep.for_strips(first, count, false, [&](const Strip& strip, int64_t i, int64_t index) {
      auto row = [&](RowStat stat) { return stat_of(row_stats, stat) + first + i; };
      ForwardOut out{};
      out.lse = row(RowStat::kLseStudent);
      out.diagonal = row(RowStat::kDiagonalStudent);
      if (sweep.teacher) {
        out.teacher_lse = row(RowStat::kLseTeacher);
        out.mean = row(RowStat::kMean);
        out.teacher_diagonal = row(RowStat::kDiagonalTeacher);
      }
      if (call.plane) {
        out.plane = call.plane->const_data_ptr<float>();
        out.pair_matching = row(RowStat::kPairMatching);
      }
      if (work.student) out.col_lse = work.student->lse_of(index);
      if (work.teacher) {
        out.col_teacher_lse = work.teacher->lse_of(index);
        out.col_mean = work.teacher->mean_of(index);
      }
      instruction_set().strip.forward(strip, out, sweep.is_bf16);
    });
    if (work.student) work.student->merge(strips_of(count));
    if (work.teacher) work.teacher->merge(strips_of(count));
  });
  return {row_stats, column_stats, sweep.stored};
}

// Decides whether one exponential suffices for the gradients of a matrix's row and column softmaxes, and fills `ratio` if so. One
// does not suffice if a row's e^(z - r) could underflow where the column's e^(z - c) does not.
struct Sharing {
  std::vector<float> ratio;  // [M]
  float top;
  bool possible;

  Sharing(const float* lse, int64_t n, const float* col_lse, const float* g_col, int64_t m) {
    top = *std::max_element(lse, lse + n);
    float lowest = kInf;
    for (int64_t j = 0; j < m; ++j)
      if (g_col[j] != 0 && col_lse[j] > -kInf) lowest = std::min(lowest, col_lse[j]);
    possible = !(top - lowest > 40.0f);
    if (!possible) return;
    ratio.resize(m);
    for (int64_t j = 0; j < m; ++j)
      ratio[j] = g_col[j] != 0 && col_lse[j] > -kInf ? g_col[j] * std::exp(top - col_lse[j]) : 0.0f;
  }
};

// The memory of backward.
struct Backward {
  Sweep sweep;
  TransposedSum d_text;

  Backward(const SimilarityGradient& call, Scratch& scratch)
      : sweep(call, &call.stored, scratch), d_text(call.text, call.need_text, sweep.is_bf16 && has_several_chunks(), scratch) {}

 private:
  bool has_several_chunks() const { return sweep.chunk < sweep.n || sweep.stored_rows % sweep.n != 0; }
};

// Returns d_image, d_text (empty when not needed), d_scale [] and d_plane [2].
std::tuple<Tensor, Tensor, Tensor, Tensor> similarity_loss_bwd(const SimilarityGradient& call) {
  call.expect_layout();
  Scratch scratch;
  Backward work(call, scratch);
  const Sweep& sweep = work.sweep;

  BackwardIn whole{};  // of all rows
  whole.lse = stat_of(call.row_stats, RowStat::kLseStudent);
  whole.g_lse = stat_of(call.grad_rows, RowStat::kLseStudent);
  whole.teacher_lse = stat_of(call.row_stats, RowStat::kLseTeacher);
  whole.g_mean = stat_of(call.grad_rows, RowStat::kMean);
  whole.g_diagonal = stat_of(call.grad_rows, RowStat::kDiagonalStudent);
  whole.g_pair_matching = stat_of(call.grad_rows, RowStat::kPairMatching);
  whole.col_lse = stat_of(call.column_stats, ColumnStat::kLseStudent);
  whole.g_col_lse = stat_of(call.grad_columns, ColumnStat::kLseStudent);
  whole.col_teacher_lse = stat_of(call.column_stats, ColumnStat::kLseTeacher);
  whole.g_col_mean = stat_of(call.grad_columns, ColumnStat::kMean);
  if (call.plane) whole.plane = call.plane->const_data_ptr<float>();

  Softmax kind = Softmax::kRows;
  std::optional<Sharing> student, teacher;
  if (call.columns) {
    student.emplace(whole.lse, sweep.n, whole.col_lse, whole.g_col_lse, sweep.m);
    whole.top = student->top;
    whole.lse_ratio = student->ratio.data();
    kind = student->possible ? Softmax::kShared : Softmax::kApart;
  }
  if (call.columns && sweep.teacher) {
    teacher.emplace(whole.teacher_lse, sweep.n, whole.col_teacher_lse, whole.g_col_mean, sweep.m);
    whole.teacher_top = teacher->top;
    whole.teacher_ratio = teacher->ratio.data();
    if (!teacher->possible) kind = Softmax::kApart;
  }

  Tensor d_image = new_empty(call.image, {call.need_image ? sweep.n : 0, sweep.d});
  std::vector<BackwardOut> parts(strips_of(sweep.chunk));
  BackwardOut total{};
  sweep.for_chunks([&](int64_t first, int64_t count) {
    sweep.for_strips(first, count, true, [&](const Strip& strip, int64_t i, int64_t index) {
      BackwardIn in = whole;
      for (auto* p : {&in.lse, &in.g_lse, &in.teacher_lse, &in.g_mean, &in.g_diagonal, &in.g_pair_matching}) *p += first + i;
      parts[index] = instruction_set().strip.backward(strip, in, kind, sweep.is_bf16);
    });
    for (int64_t index = 0; index < strips_of(count); ++index) {
      total.scale += parts[index].scale;
      total.plane[0] += parts[index].plane[0];
      total.plane[1] += parts[index].plane[1];
    }
    const Tensor g = rows(sweep.student.scratch, 0, count);
    if (call.need_image) {
      Tensor d_rows = rows(d_image, first, count);
      mm_out(d_rows, g, call.text);
    }
    work.d_text.add(g, rows(call.image, first, count));
  });

  Tensor d_scale = new_empty(call.image, {}, ScalarType::Float), d_plane = new_empty(call.image, {2}, ScalarType::Float);
  *data<float>(d_scale) = float(total.scale);
  std::copy_n(total.plane, 2, data<float>(d_plane));
  return {d_image, work.d_text.result(), d_scale, d_plane};
}

STABLE_TORCH_LIBRARY_IMPL(simplclip, Meta, m) {
  m.impl("similarity_loss_fwd_cpu_workspace", TORCH_BOX((&Unpacked<SimilarityCall, workspace<SimilarityCall, Forward>>::run)));
  m.impl("similarity_loss_bwd_cpu_workspace",
         TORCH_BOX((&Unpacked<SimilarityGradient, workspace<SimilarityGradient, Backward>>::run)));
}

STABLE_TORCH_LIBRARY_IMPL(simplclip, CPU, m) {
  m.impl("similarity_loss_fwd_cpu", TORCH_BOX((&Unpacked<SimilarityCall, similarity_loss_fwd>::run)));
  m.impl("similarity_loss_bwd_cpu", TORCH_BOX((&Unpacked<SimilarityGradient, similarity_loss_bwd>::run)));
}

}  // namespace
}  // namespace simplclip
