// The terms of similarity_loss and their gradients, from statistics of the similarity matrices: the formulas of
// simplclip/ops/similarity/statistics.py, whose twenty small ops of torch take longer than the matrix products of a small batch.
#pragma once

#include "sweep.h"

#include <cmath>
#include <tuple>

namespace simplclip {

// log(1 + e^x)
inline float softplus(float x) { return x > 80 ? x : std::log1p(std::exp(x)); }

inline float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }

// Returns the statistics of a tensor [6, N] of rows or [3, M] of columns.
inline Stats stats_of(const Tensor& t) { return {data<float>(t), t.size(1)}; }

// Returns a tensor of zeros.
inline Tensor zeros(const Tensor& like, int64_t rows, int64_t columns) {
  Tensor t = allocate(like, {rows, columns}, ScalarType::Float);
  std::fill_n(data<float>(t), t.numel(), 0.0f);
  return t;
}

class Terms {
 public:
  // row_stats [6, N], column_stats [3, M]: of a call without a group.
  Terms(const SimilarityCall& call, const Tensor& row_stats, const Tensor& column_stats)
      : call_(call), n_(row_stats.size(1)), directions_(call.columns ? 2 : 1), teacher_(call.teacher_image.has_value()),
        sides_{stats_of(row_stats), stats_of(column_stats).from(call.label_offset)}, scale_(*data<float>(call.scale)) {
    if (teacher_) teacher_scale_ = *data<float>(*call.teacher_scale);
    if (!call.plane_weight) return;
    p_ = *data<float>(*call.plane_weight);
    q_ = *data<float>(*call.plane_bias);
    const int64_t negatives = std::max<int64_t>(1, n_ * (call.text.size(0) - 1));
    share_ = call.share ? *data<float>(*call.share) : float(0.5 / negatives);
  }

  // Returns the loss [], the terms [T], or [0] if there is one, and the log-sum-exps minus the positives' logits, in a row for each
  // matrix and direction. A term is NaN where a positive's logit is infinite.
  std::tuple<Tensor, Tensor, Tensor> values() const {
    Tensor excess = allocate(call_.scale, {directions_ * (teacher_ ? 2 : 1), n_});
    double contrastive = 0, relational = 0, pair_matching = 0;
    for (int64_t i = 0; i < n_; ++i) {
      const float positive = scale_ * diagonal(i), t = teacher_ ? teacher_scale_ * sides_[0][RowStat::kDiagonalTeacher][i] : 0;
      for (int64_t k = 0; k < directions_; ++k) {
        float* const x = data<float>(excess) + k * n_ + i;
        *x = sides_[k][RowStat::kLseStudent][i] - positive;
        const float cross_entropy = softplus(*x) + 0 * positive;
        contrastive += cross_entropy;
        if (!teacher_) continue;
        float* const y = x + directions_ * n_;
        *y = sides_[k][RowStat::kLseTeacher][i] - t;
        const float entropy = float(call_.entropy), gap = sides_[k][RowStat::kMean][i] + positive - entropy * t;
        relational += cross_entropy + sigmoid(*y) * gap - entropy * softplus(*y) + 0 * t;
      }
      if (!call_.plane_weight) continue;
      const float logit = q_ + p_ * diagonal(i);
      pair_matching += share_ * sides_[0][RowStat::kPairMatching][i] + 0.5 / n_ * (softplus(-logit) + 0 * logit);
    }
    std::vector<double> values;
    double loss = 0;
    auto add = [&](bool asked, double value, double weight) {
      if (!asked) return;
      values.push_back(value);
      loss += weight * value;
    };
    const double side = 1.0 / (directions_ * n_);
    add(call_.contrastive, side * contrastive, call_.contrastive_weight);
    add(teacher_, side * relational, call_.relational_weight);
    add(call_.plane_weight.has_value(), pair_matching, call_.pair_matching_weight);
    Tensor total = allocate(call_.scale, {}), terms = allocate(call_.scale, {values.size() > 1 ? int64_t(values.size()) : 0});
    *data<float>(total) = float(loss);
    std::copy_n(values.begin(), terms.numel(), data<float>(terms));
    return {total, terms, excess};
  }

  // The gradients of the statistics, and of the scale and the plane as far as the terms depend on these beside them.
  struct Gradients {
    Tensor rows, columns;  // [6, N], [3, M]
    double scale = 0, p = 0, q = 0;
  };

  Gradients gradients(const TermsGradient& of) const {
    int64_t index = 0;
    auto factor = [&](bool asked, double weight) {
      double result = 0;
      if (asked && of.grad_terms) result += data<float>(*of.grad_terms)[index++];
      if (asked && of.grad_loss) result += weight * *data<float>(*of.grad_loss);
      return result;
    };
    const double side = 1.0 / (directions_ * n_), contrastive = factor(call_.contrastive, call_.contrastive_weight);
    const double relational = factor(teacher_, call_.relational_weight);
    const float pair_matching = float(factor(call_.plane_weight.has_value(), call_.pair_matching_weight));
    const float student = float(side * (contrastive + relational)), teacher = float(side * relational);

    Gradients out;
    out.rows = zeros(call_.scale, int64_t(RowStat::kCount), n_);
    out.columns = zeros(call_.scale, int64_t(ColumnStat::kCount), call_.text.size(0));
    const Stats sides[] = {stats_of(out.rows), stats_of(out.columns).from(call_.label_offset)};
    const float* const excess = data<float>(of.excess);
    for (int64_t i = 0; i < n_; ++i) {
      float d_positive = 0;  // minus that of the positive's logit
      for (int64_t k = 0; k < directions_; ++k) {
        d_positive += sides[k][RowStat::kLseStudent][i] = student * sigmoid(excess[k * n_ + i]);
        if (teacher_) d_positive -= sides[k][RowStat::kMean][i] = teacher * sigmoid(excess[(directions_ + k) * n_ + i]);
      }
      out.scale -= double(d_positive) * diagonal(i);
      float& d_diagonal = sides[0][RowStat::kDiagonalStudent][i];
      d_diagonal = -scale_ * d_positive;
      if (!call_.plane_weight) continue;
      sides[0][RowStat::kPairMatching][i] = share_ * pair_matching;
      const float d_logit = float(-0.5 / n_) * pair_matching * sigmoid(-(q_ + p_ * diagonal(i)));
      d_diagonal += p_ * d_logit;
      out.p += double(d_logit) * diagonal(i);
      out.q += d_logit;
    }
    return out;
  }

 private:
  float diagonal(int64_t i) const { return sides_[0][RowStat::kDiagonalStudent][i]; }

  const SimilarityCall& call_;
  int64_t n_, directions_;
  bool teacher_;
  Stats sides_[2];  // statistics of the rows, and of the positives' columns
  float scale_, teacher_scale_ = 1, p_ = 0, q_ = 0;
  float share_ = 0;  // 0.5 over the number of all negatives
};

}  // namespace simplclip
