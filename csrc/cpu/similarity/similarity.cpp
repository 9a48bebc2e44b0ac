// similarity_loss on a CPU: a sweep over row chunks. The strip kernels read each chunk's matrices once, and in backward replace
// them by their gradients, from which two products each give the gradients of the features.
#include "sweep.h"
#include "../transposed_sum.h"

#include <cmath>
#include <limits>
#include <tuple>

namespace simplclip {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// Accumulates column statistics, a log-sum-exp and optionally a mean, from [strips, M] partials to [M].
struct ColumnSums {
  Tensor lse_parts, mean_parts, own_lse;
  float *lse = nullptr, *mean = nullptr;

  // `lse` is null if the total is needed only to merge the mean.
  ColumnSums(const Sweep& sweep, float* lse_to, float* mean_to) : lse(lse_to), mean(mean_to) {
    const Tensor& like = sweep.call.image;
    lse_parts = new_empty(like, {strips_of(sweep.chunk), sweep.m}, ScalarType::Float);
    if (mean) mean_parts = new_empty(like, {strips_of(sweep.chunk), sweep.m}, ScalarType::Float);
    if (!lse) {
      own_lse = new_empty(like, {sweep.m}, ScalarType::Float);
      lse = data<float>(own_lse);
    }
    std::fill_n(lse, sweep.m, -kInf);
    if (mean) std::fill_n(mean, sweep.m, 0.0f);
  }

  void parts_of(int64_t strip, float*& lse_part, float*& mean_part) const {
    const int64_t at = strip * lse_parts.size(1);
    lse_part = data<float>(lse_parts) + at;
    mean_part = mean ? data<float>(mean_parts) + at : nullptr;
  }

  void merge(int64_t strips) const {
    const int64_t m = lse_parts.size(1);
    parallel_for(0, m, 1024, [&](int64_t begin, int64_t end) {
      instruction_set().strip.merge(data<float>(lse_parts) + begin, mean ? data<float>(mean_parts) + begin : nullptr, strips, m,
                            end - begin, lse + begin, mean ? mean + begin : nullptr);
    });
  }
};

// Returns rows [12, N], columns [6, M] and the stored rows of the matrices: see reference.py.
std::tuple<Tensor, Tensor, Tensor> similarity_loss_fwd(SIMILARITY_PARAMETERS) {
  const SimilarityCall call = SIMILARITY_CALL;
  Sweep sweep(call, nullptr);
  const StripKernels& kernels = instruction_set().strip;
  const int64_t n = sweep.n, m = sweep.m;

  Tensor row_stats = new_zeros(image, {int64_t(Row::kCount), n}, ScalarType::Float), column_stats = new_zeros(image, {int64_t(Column::kCount), m}, ScalarType::Float);
  auto row = [&](Row stat, int64_t i) { return data<float>(row_stats) + int64_t(stat) * n + i; };
  auto col = [&](Column stat) { return data<float>(column_stats) + int64_t(stat) * m; };

  std::optional<ColumnSums> student_sums, teacher_sums, text_sums, teacher_sums_of_text;
  float* const hard = negatives == kHardNegatives ? col(Column::kPairMatching) : nullptr;
  if (columns && softmax) student_sums.emplace(sweep, col(Column::kLseStudent), hard);
  if (columns && relational) teacher_sums.emplace(sweep, col(Column::kLseTeacher), col(Column::kMeanStudent));
  if (columns && interactive) text_sums.emplace(sweep, col(Column::kLseTeacherToText), nullptr);
  if (columns && interactive) teacher_sums_of_text.emplace(sweep, relational ? nullptr : col(Column::kLseTeacher), col(Column::kMeanTeacherToText));

  sweep.for_chunks([&](int64_t first, int64_t count) {
    Tensor teacher_chunk;
    if (sweep.teacher) teacher_chunk = sweep.load(*sweep.teacher, first, count, false);
    auto reduce = [&](Matrix& matrix, Terms terms, bool teacher, const std::optional<ColumnSums>& sums,
                      const std::optional<ColumnSums>& teacher_sums, auto&& outputs) {
      const Tensor sim = sweep.load(matrix, first, count, false);
      sweep.for_strips(matrix, sim, teacher ? &teacher_chunk : nullptr, first, count, [&](const Strip& strip, int64_t i, int64_t k) {
        ForwardOut out{};
        outputs(out, first + i);
        out.negatives = row(Row::kNegatives, first + i);
        if (sums) sums->parts_of(k, out.col_lse, out.col_match);
        if (teacher_sums) teacher_sums->parts_of(k, out.col_teacher_lse, out.col_mean);
        kernels.forward(strip, out, terms, sweep.is_bf16);
      });
      if (sums) sums->merge(strips_of(count));
      if (teacher_sums) teacher_sums->merge(strips_of(count));
    };
    if (sweep.hadamard_weight) sweep.load_hadamard(first, count);
    if (sweep.student)
      reduce(*sweep.student, sweep.terms(), relational, student_sums, teacher_sums, [&](ForwardOut& out, int64_t i) {
        out.lse = row(Row::kLseStudent, i);
        out.match = row(Row::kPairMatching, i);
        out.diagonal = row(Row::kDiagonalStudent, i);
        out.plane_diagonal = row(Row::kDiagonalHadamard, i);
        out.teacher_lse = row(Row::kLseTeacher, i);
        out.mean = row(Row::kMeanStudent, i);
        out.teacher_diagonal = row(Row::kDiagonalTeacher, i);
      });
    if (sweep.image_to_teacher)
      reduce(*sweep.image_to_teacher, Terms::kSoftmax, true, std::nullopt, std::nullopt, [&](ForwardOut& out, int64_t i) {
        out.lse = row(Row::kLseImageToTeacher, i);
        out.diagonal = row(Row::kDiagonalImageToTeacher, i);
        out.teacher_lse = row(Row::kLseTeacher, i);
        out.mean = row(Row::kMeanImageToTeacher, i);
        out.teacher_diagonal = row(Row::kDiagonalTeacher, i);
      });
    if (sweep.teacher_to_text)
      reduce(*sweep.teacher_to_text, Terms::kSoftmax, true, text_sums, teacher_sums_of_text,
             [&](ForwardOut& out, int64_t i) { out.diagonal = row(Row::kDiagonalTeacherToText, i); });
  });
  return {row_stats, column_stats, sweep.stored};
}

// How the gradients of one softmax are computed; fills ratios if one exponential suffices for rows and columns, i.e. unless a
// row's e^(z - r) could underflow where the column's e^(z - c) does not.
struct Sharing {
  std::vector<float> ratio;
  float top = 0;
  bool possible = true;

  Sharing(const float* lse, int64_t n, const float* col_lse, const float* g_col, int64_t m) {
    top = *std::max_element(lse, lse + n);
    float lowest = kInf;
    for (int64_t j = 0; j < m; ++j)
      if (g_col[j] != 0 && col_lse[j] > -kInf) lowest = std::min(lowest, col_lse[j]);
    possible = !(top - lowest > 40.0f);
    if (possible) fill(ratio, col_lse, g_col, m);
  }

  void fill(std::vector<float>& to, const float* col_lse, const float* g_col, int64_t m) const {
    to.resize(m);
    for (int64_t j = 0; j < m; ++j) to[j] = g_col[j] != 0 && col_lse[j] > -kInf ? g_col[j] * std::exp(top - col_lse[j]) : 0.0f;
  }
};

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Returns d_image, d_text (empty when not needed), d_scale, d_projected_image, d_projected_text (empty when not given),
// d_cross_scale, d_plane_weight (empty without), d_plane_bias.
Gradients similarity_loss_bwd(SIMILARITY_PARAMETERS, Tensor grad_rows, Tensor grad_columns, Tensor row_stats,
                              Tensor column_stats, Tensor stored, bool need_image, bool need_text) {
  const SimilarityCall call = SIMILARITY_CALL;
  expect_contiguous("grad_rows", grad_rows);
  expect_contiguous("grad_columns", grad_columns);
  expect_contiguous("row_stats", row_stats);
  expect_contiguous("column_stats", column_stats);
  Sweep sweep(call, &stored);
  const StripKernels& kernels = instruction_set().strip;
  const int64_t n = sweep.n, m = sweep.m, d = sweep.d;
  const bool hadamard = call.has_hadamard();
  auto row = [&](const Tensor& from, Row stat) { return data<const float>(from) + int64_t(stat) * n; };
  auto col = [&](const Tensor& from, Column stat) { return data<const float>(from) + int64_t(stat) * m; };

  // Arguments of the strip kernels for one of the student's matrices; the pointers to rows are advanced for each strip.
  BackwardIn student_in{}, image_in{}, text_in{};
  Softmax student_kind = Softmax::kRows;
  student_in.lse = row(row_stats, Row::kLseStudent);
  student_in.g_lse = row(grad_rows, Row::kLseStudent);
  student_in.g_match = row(grad_rows, Row::kPairMatching);
  student_in.teacher_lse = image_in.teacher_lse = text_in.teacher_lse = row(row_stats, Row::kLseTeacher);
  student_in.g_mean = row(grad_rows, Row::kMeanStudent);
  student_in.g_diagonal = row(grad_rows, Row::kDiagonalStudent);
  student_in.g_plane_diagonal = row(grad_rows, Row::kDiagonalHadamard);
  student_in.col_lse = col(column_stats, Column::kLseStudent);
  student_in.g_col_lse = col(grad_columns, Column::kLseStudent);
  student_in.g_col_match = col(grad_columns, Column::kPairMatching);
  student_in.col_teacher_lse = text_in.col_teacher_lse = col(column_stats, Column::kLseTeacher);
  student_in.g_col_mean = col(grad_columns, Column::kMeanStudent);
  image_in.lse = row(row_stats, Row::kLseImageToTeacher);
  image_in.g_lse = row(grad_rows, Row::kLseImageToTeacher);
  image_in.g_mean = row(grad_rows, Row::kMeanImageToTeacher);
  image_in.g_diagonal = row(grad_rows, Row::kDiagonalImageToTeacher);
  text_in.g_diagonal = row(grad_rows, Row::kDiagonalTeacherToText);
  text_in.col_lse = col(column_stats, Column::kLseTeacherToText);
  text_in.g_col_lse = col(grad_columns, Column::kLseTeacherToText);
  text_in.g_col_mean = col(grad_columns, Column::kMeanTeacherToText);

  std::optional<Sharing> student, teacher;
  std::vector<float> match_ratio;
  if (columns && softmax) {
    student.emplace(student_in.lse, n, student_in.col_lse, student_in.g_col_lse, m);
    if (relational) teacher.emplace(student_in.teacher_lse, n, student_in.col_teacher_lse, student_in.g_col_mean, m);
    if (negatives == kHardNegatives) {
      const Sharing match(student_in.lse, n, student_in.col_lse, student_in.g_col_match, m);
      student->possible &= match.possible;
      match_ratio = match.ratio;
    }
    student_kind = student->possible && (!teacher || teacher->possible) ? Softmax::kShared : Softmax::kApart;
    student_in.top = student->top;
    student_in.lse_ratio = student->ratio.data();
    student_in.match_ratio = match_ratio.data();
    if (teacher) student_in.teacher_top = teacher->top;
    if (teacher) student_in.teacher_ratio = teacher->ratio.data();
  }

  const bool several = sweep.chunk < n || sweep.stored_rows % n != 0;
  const bool shared_text = hadamard || (sweep.teacher_to_text && !projected_text);
  Tensor d_image = new_empty(image, {need_image ? n : 0, d});
  Tensor d_projected = projected_image ? new_empty(*projected_image, projected_image->sizes()) : new_empty(image, {0, d});
  TransposedSum d_text(text, need_text, sweep.is_bf16 && (several || (shared_text && sweep.student)));
  TransposedSum d_projected_text(projected_text ? *projected_text : text, projected_text.has_value(), sweep.is_bf16 && several);
  Tensor d_weight = plane_weight ? new_zeros(*plane_weight, plane_weight->sizes()) : new_empty(image, {0}, ScalarType::Float);
  Tensor hadamard_grad = new_empty(image, {hadamard ? sweep.chunk : 0, d});

  std::vector<BackwardOut> parts(strips_of(sweep.chunk));
  double scale_sum = 0, cross_sum = 0, p_sum = 0, q_sum = 0;
  sweep.for_chunks([&](int64_t first, int64_t count) {
    Tensor teacher_chunk;
    if (sweep.teacher) teacher_chunk = sweep.load(*sweep.teacher, first, count, true);
    // The gradient of a matrix's chunk, in its scratch.
    auto differentiate = [&](Matrix& matrix, const BackwardIn& in, Terms terms, Softmax kind, bool has_teacher, double& d_scale) {
      const Tensor sim = sweep.load(matrix, first, count, true);
      sweep.for_strips(matrix, sim, has_teacher ? &teacher_chunk : nullptr, first, count, [&](const Strip& strip, int64_t i, int64_t k) {
        BackwardIn mine = in;
        for (auto* p : {&mine.lse, &mine.g_lse, &mine.g_match, &mine.teacher_lse, &mine.g_mean, &mine.g_diagonal,
                        &mine.g_plane_diagonal})
          if (*p) *p += first + i;
        parts[k] = kernels.backward(strip, mine, terms, kind, sweep.is_bf16);
      });
      for (int64_t k = 0; k < strips_of(count); ++k) {
        d_scale += parts[k].scale;
        p_sum += parts[k].p;
        q_sum += parts[k].q;
      }
      return rows(matrix.scratch, 0, count);
    };
    const Tensor x = rows(image, first, count);
    Tensor to_image = need_image ? rows(d_image, first, count) : Tensor();
    if (hadamard) sweep.load_hadamard(first, count);
    if (sweep.student) {
      const Tensor g = differentiate(*sweep.student, student_in, sweep.terms(), student_kind, relational, scale_sum);
      if (need_image) mm_out(to_image, g, text);
      d_text.add(g, x);
    }
    if (hadamard) {
      const Tensor h = rows(sweep.hadamard, 0, count);
      Tensor hy = rows(hadamard_grad, 0, count);
      mm_out(hy, h, text);
      const float* w = sweep.hadamard_weight->const_data_ptr<float>();
      float* dw = d_weight.mutable_data_ptr<float>();
      sweep.typed([&]<class T>(T*) {
        const T *xs = data<T>(x), *hys = data<T>(hy);
        for (int64_t i = 0; i < count; ++i)
          for (int64_t k = 0; k < d; ++k) dw[k] += to_float(xs[i * d + k]) * to_float(hys[i * d + k]);
        if (!need_image) return;
        T* to = data<T>(to_image);
        parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
          for (int64_t at = begin * d; at < end * d; ++at) assign(to[at], to_float(to[at]) + w[at % d] * to_float(hys[at]));
        });
      });
      d_text.add(h, rows(sweep.weighted, 0, count));
    }
    if (sweep.image_to_teacher) {
      const Tensor g = differentiate(*sweep.image_to_teacher, image_in, Terms::kSoftmax, Softmax::kRows, true, cross_sum);
      if (projected_image) {
        Tensor to = rows(d_projected, first, count);
        mm_out(to, g, *teacher_text);
      } else if (need_image) {
        sweep.student ? mm_add(to_image, g, *teacher_text) : mm_out(to_image, g, *teacher_text);
      }
    }
    if (sweep.teacher_to_text) {
      const Tensor g = differentiate(*sweep.teacher_to_text, text_in, Terms::kSoftmax, Softmax::kColumns, true, cross_sum);
      (projected_text ? d_projected_text : d_text).add(g, rows(*teacher_image, first, count));
    }
  });
  if (!sweep.student && (projected_image || !sweep.image_to_teacher)) d_image = new_zeros(image, {need_image ? n : 0, d});

  auto number = [&](double value) {
    Tensor out = new_zeros(image, {}, ScalarType::Float);
    *out.mutable_data_ptr<float>() = float(value);
    return out;
  };
  if (plane_weight && !hadamard) *d_weight.mutable_data_ptr<float>() = float(p_sum);
  return {d_image, d_text.result(), number(scale_sum), d_projected, d_projected_text.result(), number(cross_sum), d_weight,
          number(q_sum)};
}

STABLE_TORCH_LIBRARY_IMPL(simplclip, CPU, m) {
  m.impl("similarity_loss_fwd_cpu", TORCH_BOX(&similarity_loss_fwd));
  m.impl("similarity_loss_bwd_cpu", TORCH_BOX(&similarity_loss_bwd));
}

}  // namespace
}  // namespace simplclip
