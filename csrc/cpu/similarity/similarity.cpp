// similarity_loss on a CPU: a sweep over row chunks. The strip kernels read each chunk's matrices once, and in backward replace
// them by their gradients, whose products with the features are the gradients of the student's features.
#include "sweep.h"
#include "../transposed_sum.h"

#include <cmath>
#include <limits>
#include <tuple>

namespace simplclip {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// Indices of the statistics of one of the student's matrices; kCount: none. With a row mean come the row's teacher statistics.
struct Stats {
  RowStat lse, mean, diagonal;
  ColumnStat col_lse, col_mean;
};
constexpr Stats kStudent = {RowStat::kLseStudent, RowStat::kMeanStudent, RowStat::kDiagonalStudent,
                            ColumnStat::kLseStudent, ColumnStat::kMeanStudent};
constexpr Stats kImageToTeacher = {RowStat::kLseImageToTeacher, RowStat::kMeanImageToTeacher, RowStat::kDiagonalImageToTeacher,
                                   ColumnStat::kCount, ColumnStat::kCount};
constexpr Stats kTeacherToText = {RowStat::kCount, RowStat::kCount, RowStat::kDiagonalTeacherToText,
                                  ColumnStat::kLseTeacherToText, ColumnStat::kMeanTeacherToText};

// Returns the first value of a statistic in rows [11, N] or columns [5, M]; null for kCount.
template <class Stat>
float* stat_of(const Tensor& from, Stat stat) {
  return stat == Stat::kCount ? nullptr : data<float>(from) + int64_t(stat) * from.size(1);
}

// Accumulates column statistics, a log-sum-exp and optionally a mean, from [strips, M] partials to [M].
struct ColumnSums {
  Tensor lse_parts, mean_parts, own_lse;
  float *lse = nullptr, *mean = nullptr;

  ColumnSums(const Sweep& sweep, bool has_lse, bool has_mean, Scratch& scratch) {
    const Tensor& like = sweep.call.image;
    lse_parts = scratch.take(like, {strips_of(sweep.chunk), sweep.m}, ScalarType::Float);
    if (has_mean) mean_parts = scratch.take(like, {strips_of(sweep.chunk), sweep.m}, ScalarType::Float);
    if (!has_lse) own_lse = scratch.take(like, {sweep.m}, ScalarType::Float);
  }

  // `lse_to` is null if the total is needed only to merge the mean; `mean_to` is null if there is no mean.
  void start(float* lse_to, float* mean_to) {
    const int64_t m = lse_parts.size(1);
    lse = lse_to ? lse_to : data<float>(own_lse);
    mean = mean_to;
    std::fill_n(lse, m, -kInf);
    if (mean) std::fill_n(mean, m, 0.0f);
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
  std::optional<ColumnSums> student, teacher, text, teacher_of_text;

  Forward(const SimilarityCall& call, Scratch& scratch) : sweep(call, nullptr, scratch) {
    if (!call.columns) return;
    if (call.softmax) student.emplace(sweep, true, false, scratch);
    if (call.relational) teacher.emplace(sweep, true, true, scratch);
    if (call.interactive) text.emplace(sweep, true, false, scratch);
    if (call.interactive) teacher_of_text.emplace(sweep, !call.relational, true, scratch);
  }
};

// Returns rows [11, N], columns [5, M] and the stored rows of the matrices: see reference.py.
std::tuple<Tensor, Tensor, Tensor> similarity_loss_fwd(const SimilarityCall& call) {
  Scratch scratch;
  Forward work(call, scratch);
  Sweep& sweep = work.sweep;
  const StripKernels& kernels = instruction_set().strip;
  const int64_t n = sweep.n, m = sweep.m;

  Tensor row_stats = new_zeros(call.image, {int64_t(RowStat::kCount), n}, ScalarType::Float);
  Tensor column_stats = new_zeros(call.image, {int64_t(ColumnStat::kCount), m}, ScalarType::Float);
  auto col = [&](ColumnStat stat) { return stat_of(column_stats, stat); };
  if (work.student) work.student->start(col(ColumnStat::kLseStudent), nullptr);
  if (work.teacher) work.teacher->start(col(ColumnStat::kLseTeacher), col(ColumnStat::kMeanStudent));
  if (work.text) work.text->start(col(ColumnStat::kLseTeacherToText), nullptr);
  float* const lse_teacher = call.relational ? nullptr : col(ColumnStat::kLseTeacher);
  if (work.teacher_of_text) work.teacher_of_text->start(lse_teacher, col(ColumnStat::kMeanTeacherToText));

  sweep.for_chunks([&](int64_t first, int64_t count) {
    Tensor teacher_chunk;
    if (sweep.teacher) teacher_chunk = sweep.load(*sweep.teacher, first, count, false);
    auto reduce = [&](std::optional<Matrix>& matrix, const Stats& stats, bool has_teacher,
                      const std::optional<ColumnSums>& sums, const std::optional<ColumnSums>& teacher_sums) {
      if (!matrix) return;
      const Tensor sim = sweep.load(*matrix, first, count, false);
      const Tensor* const of_teacher = has_teacher ? &teacher_chunk : nullptr;
      sweep.for_strips(*matrix, sim, of_teacher, first, count, [&](const Strip& strip, int64_t i, int64_t k) {
        auto row = [&](RowStat stat) { return stat == RowStat::kCount ? nullptr : stat_of(row_stats, stat) + first + i; };
        ForwardOut out{};
        if (&*matrix == &*sweep.student) {
          out.sigmoids = sweep.sigmoids(first + i);
          out.sigmoid[0] = row(RowStat::kSigmoid);
          out.sigmoid[1] = row(RowStat::kSecondSigmoid);
        }
        out.lse = row(stats.lse);
        out.mean = row(stats.mean);
        if (out.mean) out.teacher_lse = row(RowStat::kLseTeacher);
        if (out.mean) out.teacher_diagonal = row(RowStat::kDiagonalTeacher);
        out.diagonal = row(stats.diagonal);
        if (sums) out.col_lse = sums->lse_of(k);
        if (teacher_sums) out.col_teacher_lse = teacher_sums->lse_of(k);
        if (teacher_sums) out.col_mean = teacher_sums->mean_of(k);
        kernels.forward(strip, out, sweep.is_bf16);
      });
      if (sums) sums->merge(strips_of(count));
      if (teacher_sums) teacher_sums->merge(strips_of(count));
    };
    reduce(sweep.student, kStudent, call.relational, work.student, work.teacher);
    reduce(sweep.image_to_teacher, kImageToTeacher, true, std::nullopt, std::nullopt);
    reduce(sweep.teacher_to_text, kTeacherToText, true, work.text, work.teacher_of_text);
  });
  return {row_stats, column_stats, sweep.stored};
}

// Decides whether one exponential suffices for the gradients of a matrix's row and column softmaxes, and fills `ratio` if so. One
// does not suffice if a row's e^(z - r) could underflow where the column's e^(z - c) does not.
struct Sharing {
  std::vector<float> ratio;
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

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The memory of backward.
struct Backward {
  Sweep sweep;
  TransposedSum d_text, d_projected_text;
  Tensor sigmoid_grads;  // [strips, M]: scratch of one row for each strip

  Backward(const SimilarityGradient& call, Scratch& scratch)
      : sweep(call, &call.stored, scratch),
        d_text(call.text, call.need_text, sweep.is_bf16 && (several() || (shares_text(call) && sweep.student)), scratch),
        d_projected_text(call.projected_text ? *call.projected_text : call.text, call.projected_text.has_value(),
                         sweep.is_bf16 && several(), scratch),
        sigmoid_grads(scratch.take(call.image, {call.sigmoids() ? strips_of(sweep.chunk) : 0, sweep.m}, ScalarType::Float)) {}

 private:
  bool several() const { return sweep.chunk < sweep.n || sweep.stored_rows % sweep.n != 0; }
  bool shares_text(const SimilarityCall& call) const { return call.has_teacher_to_text() && !call.projected_text; }
};

// Returns d_image, d_text (empty when not needed), d_scale, d_projected_image, d_projected_text (empty when not given),
// d_cross_scale, d_sigmoid_weight and d_sigmoid_bias [K].
Gradients similarity_loss_bwd(const SimilarityGradient& call) {
  expect_contiguous("grad_rows", call.grad_rows);
  expect_contiguous("grad_columns", call.grad_columns);
  expect_contiguous("row_stats", call.row_stats);
  expect_contiguous("column_stats", call.column_stats);
  Scratch scratch;
  Backward work(call, scratch);
  Sweep& sweep = work.sweep;
  const StripKernels& kernels = instruction_set().strip;
  const int64_t n = sweep.n, m = sweep.m, d = sweep.d;

  // Arguments of the strip kernels for one of the student's matrices; the pointers to rows are advanced for each strip.
  auto inputs_of = [&](const Stats& stats) {
    BackwardIn in{};
    in.lse = stat_of(call.row_stats, stats.lse);
    in.g_lse = stat_of(call.grad_rows, stats.lse);
    in.teacher_lse = stat_of(call.row_stats, RowStat::kLseTeacher);
    in.g_mean = stat_of(call.grad_rows, stats.mean);
    in.g_diagonal = stat_of(call.grad_rows, stats.diagonal);
    in.col_lse = stat_of(call.column_stats, stats.col_lse);
    in.g_col_lse = stat_of(call.grad_columns, stats.col_lse);
    in.col_teacher_lse = stat_of(call.column_stats, ColumnStat::kLseTeacher);
    in.g_col_mean = stat_of(call.grad_columns, stats.col_mean);
    return in;
  };
  BackwardIn student_in = inputs_of(kStudent);
  Softmax student_kind = Softmax::kRows;
  std::optional<Sharing> student, teacher;
  if (call.columns && call.softmax) {
    student.emplace(student_in.lse, n, student_in.col_lse, student_in.g_col_lse, m);
    if (call.relational) teacher.emplace(student_in.teacher_lse, n, student_in.col_teacher_lse, student_in.g_col_mean, m);
    student_in.top = student->top;
    student_in.lse_ratio = student->ratio.data();
    if (teacher) student_in.teacher_top = teacher->top;
    if (teacher) student_in.teacher_ratio = teacher->ratio.data();
    student_kind = student->possible && (!teacher || teacher->possible) ? Softmax::kShared : Softmax::kApart;
  }

  Tensor d_image = new_empty(call.image, {call.need_image ? n : 0, d});
  Tensor d_projected = call.projected_image ? new_empty(*call.projected_image, call.projected_image->sizes())
                                            : new_empty(call.image, {0, d});
  TransposedSum &d_text = work.d_text, &d_projected_text = work.d_projected_text;

  std::vector<BackwardOut> parts(strips_of(sweep.chunk));
  double scale_sum = 0, cross_sum = 0, weight_sums[2] = {}, bias_sums[2] = {};
  sweep.for_chunks([&](int64_t first, int64_t count) {
    Tensor teacher_chunk;
    if (sweep.teacher) teacher_chunk = sweep.load(*sweep.teacher, first, count, true);
    // Returns the gradient of a chunk of a matrix, in the matrix's scratch.
    auto differentiate = [&](Matrix& matrix, const BackwardIn& in, Softmax kind, bool has_teacher, double& d_scale) {
      const Tensor sim = sweep.load(matrix, first, count, true);
      const Tensor* const of_teacher = has_teacher ? &teacher_chunk : nullptr;
      sweep.for_strips(matrix, sim, of_teacher, first, count, [&](const Strip& strip, int64_t i, int64_t k) {
        BackwardIn mine = in;
        for (auto* p : {&mine.lse, &mine.g_lse, &mine.teacher_lse, &mine.g_mean, &mine.g_diagonal})
          if (*p) *p += first + i;
        if (&matrix == &*sweep.student) {
          mine.sigmoids = sweep.sigmoids(first + i);
          mine.g_sigmoid[0] = stat_of(call.grad_rows, RowStat::kSigmoid) + first + i;
          mine.g_sigmoid[1] = stat_of(call.grad_rows, RowStat::kSecondSigmoid) + first + i;
          mine.sigmoid_grad = data<float>(work.sigmoid_grads) + (call.sigmoids() ? k * m : 0);
        }
        parts[k] = kernels.backward(strip, mine, kind, sweep.is_bf16);
      });
      for (int64_t k = 0; k < strips_of(count); ++k) {
        d_scale += parts[k].scale;
        for (int64_t t = 0; t < 2; ++t) {
          weight_sums[t] += parts[k].sigmoids.weight[t];
          bias_sums[t] += parts[k].sigmoids.bias[t];
        }
      }
      return rows(matrix.scratch, 0, count);
    };
    const Tensor x = rows(call.image, first, count);
    Tensor to_image = call.need_image ? rows(d_image, first, count) : Tensor();
    if (sweep.student) {
      const Tensor g = differentiate(*sweep.student, student_in, student_kind, call.relational, scale_sum);
      if (call.need_image) mm_out(to_image, g, call.text);
      d_text.add(g, x);
    }
    if (sweep.image_to_teacher) {
      const Tensor g = differentiate(*sweep.image_to_teacher, inputs_of(kImageToTeacher), Softmax::kRows, true, cross_sum);
      if (call.projected_image) {
        Tensor to = rows(d_projected, first, count);
        mm_out(to, g, *call.teacher_text);
      } else if (call.need_image) {
        sweep.student ? mm_add(to_image, g, *call.teacher_text) : mm_out(to_image, g, *call.teacher_text);
      }
    }
    if (sweep.teacher_to_text) {
      const Tensor g = differentiate(*sweep.teacher_to_text, inputs_of(kTeacherToText), Softmax::kColumns, true, cross_sum);
      (call.projected_text ? d_projected_text : d_text).add(g, rows(*call.teacher_image, first, count));
    }
  });
  if (!sweep.student && (call.projected_image || !sweep.image_to_teacher)) torch::stable::zero_(d_image);

  auto number = [&](double value) {
    Tensor out = new_zeros(call.image, {}, ScalarType::Float);
    *out.mutable_data_ptr<float>() = float(value);
    return out;
  };
  auto numbers = [&](const double* values) {
    Tensor out = new_zeros(call.image, {call.sigmoids()}, ScalarType::Float);
    std::copy_n(values, call.sigmoids(), out.mutable_data_ptr<float>());
    return out;
  };
  return {d_image, d_text.result(), number(scale_sum), d_projected, d_projected_text.result(), number(cross_sum),
          numbers(weight_sums), numbers(bias_sums)};
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
