// similarity_loss on a CPU: a sweep over row chunks. Each chunk's matrices are read once by the strip kernels, and in backward
// turned into their own gradients, from which two more products each give the gradients of the features.
#include "sweep.h"
#include "../transposed_sum.h"

#include <cmath>
#include <limits>
#include <tuple>

namespace simplclip {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// Column statistics in the making: a log-sum-exp and perhaps a mean, from [strips, M] partials to [M].
struct ColumnSums {
  Tensor lse_parts, mean_parts, own_lse;
  float *lse = nullptr, *mean = nullptr;

  // `lse` null: the total is needed only to merge the mean.
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

// Returns rows [12, N], columns [6, M] and the stored rows of each plane [planes, stored_rows, M]: see reference.py.
std::tuple<Tensor, Tensor, Tensor> similarity_loss_fwd(
    Tensor image, Tensor text, Tensor scale, std::optional<Tensor> teacher_image, std::optional<Tensor> teacher_text,
    std::optional<Tensor> teacher_scale, std::optional<Tensor> projected_image, std::optional<Tensor> projected_text,
    std::optional<Tensor> cross_scale, std::optional<Tensor> plane_weight, std::optional<Tensor> plane_bias,
    std::optional<Tensor> ids, std::optional<Tensor> text_ids, int64_t label_offset, bool softmax, bool columns,
    int64_t negatives, bool relational, bool interactive, double entropy, int64_t chunk, int64_t stored_rows) {
  const Call call{image, text, scale, teacher_image, teacher_text, teacher_scale, projected_image, projected_text, cross_scale,
                  plane_weight, plane_bias, ids, text_ids, label_offset, softmax, columns, negatives, relational,
                  interactive, entropy};
  Sweep sweep(call, chunk, stored_rows, nullptr);
  const StripKernels& kernels = instruction_set().strip;
  const int64_t n = sweep.n, m = sweep.m;

  Tensor row_stats = new_zeros(image, {kRows, n}, ScalarType::Float), col_stats = new_zeros(image, {kColumns, m}, ScalarType::Float);
  auto row = [&](Row stat, int64_t i) { return data<float>(row_stats) + stat * n + i; };
  auto col = [&](Column stat) { return data<float>(col_stats) + stat * m; };

  std::optional<ColumnSums> z_sums, t_sums, v_sums, t_sums_of_v;
  if (columns && softmax) z_sums.emplace(sweep, col(kColLseZ), negatives == kHard ? col(kColMatch) : nullptr);
  if (columns && relational) t_sums.emplace(sweep, col(kColLseT), col(kColMeanZ));
  if (columns && interactive) v_sums.emplace(sweep, col(kColLseV), nullptr);
  if (columns && interactive) t_sums_of_v.emplace(sweep, relational ? nullptr : col(kColLseT), col(kColMeanV));

  sweep.for_chunks([&](int64_t first, int64_t count) {
    Tensor t;
    if (sweep.t) t = sweep.load(*sweep.t, first, count, false);
    auto reduce = [&](Plane& student, Terms terms, bool teacher, const std::optional<ColumnSums>& sums,
                      const std::optional<ColumnSums>& teacher_sums, auto&& outputs) {
      const Tensor sim = sweep.load(student, first, count, false);
      sweep.for_strips(student, sim, teacher ? &t : nullptr, first, count, [&](const Strip& strip, int64_t i, int64_t k) {
        ForwardOut out{};
        outputs(out, first + i);
        out.negatives = row(kNegatives, first + i);
        if (sums) sums->parts_of(k, out.col_lse, out.col_match);
        if (teacher_sums) teacher_sums->parts_of(k, out.col_teacher_lse, out.col_mean);
        kernels.forward(strip, out, terms, sweep.is_bf16);
      });
      if (sums) sums->merge(strips_of(count));
      if (teacher_sums) teacher_sums->merge(strips_of(count));
    };
    if (sweep.plane_weight) sweep.load_hadamard(first, count);
    if (sweep.z)
      reduce(*sweep.z, sweep.terms(), relational, z_sums, t_sums, [&](ForwardOut& out, int64_t i) {
        out.lse = row(kLseZ, i);
        out.match = row(kMatch, i);
        out.diagonal = row(kDiagonalZ, i);
        out.plane_diagonal = row(kDiagonalL, i);
        out.teacher_lse = row(kLseT, i);
        out.mean = row(kMeanZ, i);
        out.teacher_diagonal = row(kDiagonalT, i);
      });
    if (sweep.u)
      reduce(*sweep.u, Terms::kSoftmax, true, std::nullopt, std::nullopt, [&](ForwardOut& out, int64_t i) {
        out.lse = row(kLseU, i);
        out.diagonal = row(kDiagonalU, i);
        out.teacher_lse = row(kLseT, i);
        out.mean = row(kMeanU, i);
        out.teacher_diagonal = row(kDiagonalT, i);
      });
    if (sweep.v)
      reduce(*sweep.v, Terms::kSoftmax, true, v_sums, t_sums_of_v,
             [&](ForwardOut& out, int64_t i) { out.diagonal = row(kDiagonalV, i); });
  });
  return {row_stats, col_stats, sweep.stored};
}

// How one softmax's gradients are formed; fills ratios where one exponential serves rows and columns, which it does unless a
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
Gradients similarity_loss_bwd(
    Tensor grad_rows, Tensor grad_columns, Tensor image, Tensor text, Tensor scale, std::optional<Tensor> teacher_image,
    std::optional<Tensor> teacher_text, std::optional<Tensor> teacher_scale, std::optional<Tensor> projected_image,
    std::optional<Tensor> projected_text, std::optional<Tensor> cross_scale, std::optional<Tensor> plane_weight,
    std::optional<Tensor> plane_bias, std::optional<Tensor> ids, std::optional<Tensor> text_ids, Tensor row_stats,
    Tensor col_stats, Tensor stored, int64_t label_offset, bool softmax, bool columns, int64_t negatives, bool relational,
    bool interactive, double entropy, bool need_image, bool need_text, int64_t chunk) {
  const Call call{image, text, scale, teacher_image, teacher_text, teacher_scale, projected_image, projected_text, cross_scale,
                  plane_weight, plane_bias, ids, text_ids, label_offset, softmax, columns, negatives, relational,
                  interactive, entropy};
  expect_contiguous("grad_rows", grad_rows);
  expect_contiguous("grad_columns", grad_columns);
  expect_contiguous("rows", row_stats);
  expect_contiguous("columns", col_stats);
  Sweep sweep(call, chunk, stored.size(1), &stored);
  const StripKernels& kernels = instruction_set().strip;
  const int64_t n = sweep.n, m = sweep.m, d = sweep.d;
  const bool hadamard = sweep.plane_weight.has_value();
  auto row = [&](const Tensor& from, Row stat) { return data<const float>(from) + stat * n; };
  auto col = [&](const Tensor& from, Column stat) { return data<const float>(from) + stat * m; };

  // Arguments of the strip kernels for a student plane; the pointers to rows are moved to each strip.
  BackwardIn z_in{}, u_in{}, v_in{};
  Softmax z_kind = Softmax::kRows;
  z_in.lse = row(row_stats, kLseZ);
  z_in.g_lse = row(grad_rows, kLseZ);
  z_in.g_match = row(grad_rows, kMatch);
  z_in.teacher_lse = u_in.teacher_lse = v_in.teacher_lse = row(row_stats, kLseT);
  z_in.g_mean = row(grad_rows, kMeanZ);
  z_in.g_diagonal = row(grad_rows, kDiagonalZ);
  z_in.g_plane_diagonal = row(grad_rows, kDiagonalL);
  z_in.col_lse = col(col_stats, kColLseZ);
  z_in.g_col_lse = col(grad_columns, kColLseZ);
  z_in.g_col_match = col(grad_columns, kColMatch);
  z_in.col_teacher_lse = v_in.col_teacher_lse = col(col_stats, kColLseT);
  z_in.g_col_mean = col(grad_columns, kColMeanZ);
  u_in.lse = row(row_stats, kLseU);
  u_in.g_lse = row(grad_rows, kLseU);
  u_in.g_mean = row(grad_rows, kMeanU);
  u_in.g_diagonal = row(grad_rows, kDiagonalU);
  v_in.g_diagonal = row(grad_rows, kDiagonalV);
  v_in.col_lse = col(col_stats, kColLseV);
  v_in.g_col_lse = col(grad_columns, kColLseV);
  v_in.g_col_mean = col(grad_columns, kColMeanV);

  std::optional<Sharing> student, teacher;
  std::vector<float> match_ratio;
  if (columns && softmax) {
    student.emplace(z_in.lse, n, z_in.col_lse, z_in.g_col_lse, m);
    if (relational) teacher.emplace(z_in.teacher_lse, n, z_in.col_teacher_lse, z_in.g_col_mean, m);
    if (negatives == kHard) {
      const Sharing match(z_in.lse, n, z_in.col_lse, z_in.g_col_match, m);
      student->possible &= match.possible;
      match_ratio = match.ratio;
    }
    z_kind = student->possible && (!teacher || teacher->possible) ? Softmax::kShared : Softmax::kApart;
    z_in.top = student->top;
    z_in.lse_ratio = student->ratio.data();
    z_in.match_ratio = match_ratio.data();
    if (teacher) z_in.teacher_top = teacher->top;
    if (teacher) z_in.teacher_ratio = teacher->ratio.data();
  }

  const bool several = sweep.chunk < n || sweep.stored_rows % n != 0;
  const bool shared_text = hadamard || (sweep.v && !projected_text);
  Tensor d_image = new_empty(image, {need_image ? n : 0, d});
  Tensor d_projected = projected_image ? new_empty(*projected_image, projected_image->sizes()) : new_empty(image, {0, d});
  TransposedSum d_text(text, need_text, sweep.is_bf16 && (several || (shared_text && sweep.z)));
  TransposedSum d_projected_text(projected_text ? *projected_text : text, projected_text.has_value(), sweep.is_bf16 && several);
  Tensor d_weight = plane_weight ? new_zeros(*plane_weight, plane_weight->sizes()) : new_empty(image, {0}, ScalarType::Float);
  Tensor plane_grad = new_empty(image, {hadamard ? sweep.chunk : 0, d});

  std::vector<BackwardOut> parts(strips_of(sweep.chunk));
  double scale_sum = 0, cross_sum = 0, p_sum = 0, q_sum = 0;
  sweep.for_chunks([&](int64_t first, int64_t count) {
    Tensor t;
    if (sweep.t) t = sweep.load(*sweep.t, first, count, true);
    // The gradient of a plane's chunk, in its scratch.
    auto differentiate = [&](Plane& plane, const BackwardIn& in, Terms terms, Softmax kind, bool has_teacher, double& d_scale) {
      const Tensor sim = sweep.load(plane, first, count, true);
      sweep.for_strips(plane, sim, has_teacher ? &t : nullptr, first, count, [&](const Strip& strip, int64_t i, int64_t k) {
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
      return rows(plane.scratch, 0, count);
    };
    const Tensor x = rows(image, first, count);
    Tensor to_image = need_image ? rows(d_image, first, count) : Tensor();
    if (hadamard) sweep.load_hadamard(first, count);
    if (sweep.z) {
      const Tensor g = differentiate(*sweep.z, z_in, sweep.terms(), z_kind, relational, scale_sum);
      if (need_image) mm_out(to_image, g, text);
      d_text.add(g, x);
    }
    if (hadamard) {
      const Tensor h = rows(sweep.plane_product, 0, count);
      Tensor hy = rows(plane_grad, 0, count);
      mm_out(hy, h, text);
      const float* w = sweep.plane_weight->const_data_ptr<float>();
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
    if (sweep.u) {
      const Tensor g = differentiate(*sweep.u, u_in, Terms::kSoftmax, Softmax::kRows, true, cross_sum);
      if (projected_image) {
        Tensor to = rows(d_projected, first, count);
        mm_out(to, g, *teacher_text);
      } else if (need_image) {
        sweep.z ? mm_add(to_image, g, *teacher_text) : mm_out(to_image, g, *teacher_text);
      }
    }
    if (sweep.v) {
      const Tensor g = differentiate(*sweep.v, v_in, Terms::kSoftmax, Softmax::kColumns, true, cross_sum);
      (projected_text ? d_projected_text : d_text).add(g, rows(*teacher_image, first, count));
    }
  });
  if (!sweep.z && (projected_image || !sweep.u)) d_image = new_zeros(image, {need_image ? n : 0, d});

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
