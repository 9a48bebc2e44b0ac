// similarity_loss on a CPU: a sweep over row chunks. The strip kernels read each chunk's matrices once, and in backward replace
// the student's by its gradient, whose products with the features are the gradients of the features.
#include "terms.h"

#include <limits>
#include <tuple>

namespace simplclip {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// Merges statistics of the columns over each strip of a chunk, [strips, 3 or 1, M], into those of whole columns.
void merge(const Tensor& parts, int64_t strips, const Stats& whole) {
  parallel_for(0, parts.size(2), 1024, [&](int64_t begin, int64_t end) {
    const auto merge = instruction_set().strip.merge;
    const Stats part = Stats{data<float>(parts), parts.size(2)}.from(begin), total = whole.from(begin);
    const int64_t stride = parts.stride(0), count = end - begin;
    merge(part[RowStat::kLseStudent], nullptr, strips, stride, count, total[RowStat::kLseStudent], nullptr);
    if (parts.size(1) > 1)
      merge(part[RowStat::kLseTeacher], part[RowStat::kMean], strips, stride, count, total[RowStat::kLseTeacher],
            total[RowStat::kMean]);
  });
}

// Returns rows [6, N], columns [3, M] and the stored rows of the matrices: see reference.py.
std::tuple<Tensor, Tensor, Tensor> similarity_loss_fwd(const SimilarityCall& call) {
  const Sweep sweep(call, nullptr);
  // no strips if statistics of columns are not needed
  const Tensor parts = allocate(
      call.image, {call.columns ? strips_of(sweep.chunk) : 0, sweep.teacher ? 3 : 1, sweep.m}, ScalarType::Float);
  const Tensor row_stats = zeros(call.image, int64_t(RowStat::kCount), sweep.n);
  const Tensor column_stats = zeros(call.image, int64_t(ColumnStat::kCount), sweep.m);
  const Stats rows = stats_of(row_stats), columns = stats_of(column_stats);
  if (call.columns) std::fill_n(columns[RowStat::kLseStudent], sweep.m, -kInf);
  if (call.columns && sweep.teacher) std::fill_n(columns[RowStat::kLseTeacher], sweep.m, -kInf);

  sweep.for_chunks([&](int64_t first, int64_t count) {
    sweep.for_strips(first, count, false, [&](const Strip& strip, int64_t i, int64_t index) {
      float* const part = call.columns ? data<float>(parts) + index * parts.stride(0) : nullptr;
      instruction_set().strip.forward(strip, {rows.from(first + i), {part, sweep.m}, sweep.plane()}, sweep.is_bf16);
    });
    if (call.columns) merge(parts, strips_of(count), columns);
  });
  return {row_stats, column_stats, sweep.stored};
}

// Decides whether one exponential suffices for the gradients of a matrix's row and column softmaxes, and fills `ratio` if so. One
// does not suffice if a row's e^(z - r) could underflow where the column's e^(z - c) does not.
struct Sharing {
  std::vector<float> ratio;  // [M]
  float top;
  bool possible;

  // lse_stat: the softmaxes' log-sum-exps. grad_stat: the statistic of a column whose gradient this softmax passes on.
  Sharing(const BackwardIn& in, RowStat lse_stat, RowStat grad_stat) {
    const float *lse = in.rows[lse_stat], *col_lse = in.columns[lse_stat], *g_col = in.g_columns[grad_stat];
    const int64_t m = in.columns.stride;
    top = *std::max_element(lse, lse + in.rows.stride);
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

// Returns d_image, d_text (empty when not needed), d_scale [] and d_plane [2].
std::tuple<Tensor, Tensor, Tensor, Tensor> similarity_loss_bwd(const SimilarityGradient& call) {
  const Sweep sweep(call, &call.stored);
  FeatureGradients gradients(sweep, call.need_image, call.need_text);

  BackwardIn whole{};  // of all rows
  whole.rows = stats_of(call.row_stats);
  whole.g_rows = stats_of(call.grad_rows);
  whole.columns = stats_of(call.column_stats);
  whole.g_columns = stats_of(call.grad_columns);
  whole.plane = sweep.plane();

  Softmax kind = Softmax::kRows;
  std::optional<Sharing> student, teacher;
  if (call.columns) {
    student.emplace(whole, RowStat::kLseStudent, RowStat::kLseStudent);
    whole.top = student->top;
    whole.ratio = student->ratio.data();
    kind = student->possible ? Softmax::kShared : Softmax::kApart;
  }
  if (call.columns && sweep.teacher) {
    teacher.emplace(whole, RowStat::kLseTeacher, RowStat::kMean);
    whole.teacher_top = teacher->top;
    whole.teacher_ratio = teacher->ratio.data();
    if (!teacher->possible) kind = Softmax::kApart;
  }

  std::vector<BackwardOut> parts(strips_of(sweep.chunk));
  BackwardOut total{};
  sweep.for_chunks([&](int64_t first, int64_t count) {
    sweep.for_strips(first, count, true, [&](const Strip& strip, int64_t i, int64_t index) {
      BackwardIn in = whole;
      in.rows = whole.rows.from(first + i);
      in.g_rows = whole.g_rows.from(first + i);
      parts[index] = instruction_set().strip.backward(strip, in, kind, sweep.is_bf16);
    });
    for (int64_t index = 0; index < strips_of(count); ++index) {
      total.scale += parts[index].scale;
      total.plane[0] += parts[index].plane[0];
      total.plane[1] += parts[index].plane[1];
    }
    gradients.add(first, count);
  });

  Tensor d_scale = allocate(call.image, {}, ScalarType::Float), d_plane = allocate(call.image, {2}, ScalarType::Float);
  *data<float>(d_scale) = float(total.scale);
  std::copy_n(total.plane, 2, data<float>(d_plane));
  return {gradients.image(), gradients.text(), d_scale, d_plane};
}

// Returns the results of SimilarityCall: the loss, the terms, rows, columns, excess, no parts, and the stored rows.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> similarity_terms_fwd(const SimilarityCall& call) {
  const auto [rows, columns, stored] = similarity_loss_fwd(call);
  const auto [loss, terms, excess] = Terms(call, rows, columns).values();
  return {loss, terms, rows, columns, excess, allocate(call.scale, {0}), stored};
}

// Returns d_image, d_text (empty when not needed), d_scale [] and d_plane [2] from the gradients of the loss and the terms.
std::tuple<Tensor, Tensor, Tensor, Tensor> similarity_terms_bwd(const TermsGradient& call) {
  const auto of_terms = Terms(call, call.row_stats, call.column_stats).gradients(call);
  SimilarityGradient gradient{call, of_terms.rows, of_terms.columns};
  const auto results = similarity_loss_bwd(gradient);
  *data<float>(std::get<2>(results)) += float(of_terms.scale);
  float* const d_plane = data<float>(std::get<3>(results));
  d_plane[0] += float(of_terms.p);
  d_plane[1] += float(of_terms.q);
  return results;
}

STABLE_TORCH_LIBRARY_IMPL(simplclip, CPU, m) {
  m.impl("similarity_loss_fwd_cpu", TORCH_BOX((&Unpacked<SimilarityCall, similarity_loss_fwd>::run)));
  m.impl("similarity_loss_bwd_cpu", TORCH_BOX((&Unpacked<SimilarityGradient, similarity_loss_bwd>::run)));
  m.impl("similarity_terms_fwd_cpu", TORCH_BOX((&Unpacked<SimilarityCall, similarity_terms_fwd>::run)));
  m.impl("similarity_terms_bwd_cpu", TORCH_BOX((&Unpacked<TermsGradient, similarity_terms_bwd>::run)));
}

}  // namespace
}  // namespace simplclip
