// similarity_loss on a CPU: the row-chunk sweep. A chunk is some rows of S = x y^T, all columns; it is computed by one matrix
// product, read once by the strip kernels, and in backward turned into its own gradient, from which two more products give
// the gradients of the features. Forward keeps the first `stored` rows of S, so that backward need not compute them again.
// The chunk and the stored rows are the only memory that grows with N*M, and byte budgets bound both.
#include "../common.h"
#include "similarity_strip.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <unordered_map>
#include <vector>

namespace simplclip {
namespace {

using torch::stable::new_empty;
using torch::stable::new_zeros;
using torch::stable::parallel_for;
using torch::stable::transpose;

constexpr float kInf = std::numeric_limits<float>::infinity();

enum Negatives : int64_t { kNone = 0, kEvery = 1, kHard = 2 };

Terms terms_of(bool contrastive, int64_t negatives) {
  if (negatives == kHard) return Terms::kSoftmaxHard;
  if (negatives == kEvery) return contrastive ? Terms::kSoftmaxAll : Terms::kAll;
  return Terms::kSoftmax;
}

float scalar(const std::optional<Tensor>& t, float otherwise) {
  return t ? *t->const_data_ptr<float>() : otherwise;
}

// The ids as small integers: equal where the ids are equal.
struct Ids {
  std::vector<int32_t> row, column;
  Ids(const std::optional<Tensor>& ids, const std::optional<Tensor>& text_ids) {
    if (!ids) return;
    std::unordered_map<int64_t, int32_t> rank;
    auto fill = [&](std::vector<int32_t>& to, const Tensor& from) {
      const int64_t* p = from.const_data_ptr<int64_t>();
      to.resize(from.size(0));
      for (size_t i = 0; i < to.size(); ++i) to[i] = rank.emplace(p[i], int32_t(rank.size())).first->second;
    };
    fill(row, *ids);
    fill(column, *text_ids);
  }
};

// One sweep over row chunks: the inputs, the scratch of a chunk, and the strips of it.
struct Sweep {
  const Tensor &image, &text;         // [N, D], [M, D], float or bf16
  std::optional<Tensor> plane;        // [D]: the hadamard plane's w
  int64_t n, m, d, label_offset, chunk;
  bool is_bf16;
  float scale, p, q;
  Ids ids;
  Tensor stored;                      // [stored rows, M]: S of the first rows
  Tensor scratch, plane_product;      // [chunk, M]
  Tensor weighted;                    // [chunk, D]: x * w

  Sweep(const Tensor& image, const Tensor& text, const Tensor& logit_scale, const std::optional<Tensor>& plane_weight,
        const std::optional<Tensor>& plane_bias, const std::optional<Tensor>& row_ids, const std::optional<Tensor>& text_ids,
        int64_t label_offset, int64_t chunk, const Tensor& stored, bool backward)
      : image(image), text(text), n(image.size(0)), m(text.size(0)), d(image.size(1)), label_offset(label_offset),
        chunk(std::min(chunk, n)), is_bf16(image.scalar_type() == ScalarType::BFloat16),
        scale(*logit_scale.const_data_ptr<float>()), p(1), q(scalar(plane_bias, 0)), ids(row_ids, text_ids),
        stored(stored),
        scratch(new_empty(image, {backward || stored.size(0) < n ? this->chunk : 0, m})) {
    if (plane_weight && plane_weight->dim() == 1) {
      plane = *plane_weight;
      plane_product = new_empty(image, {this->chunk, m});
      weighted = new_empty(image, {this->chunk, d});
    } else if (plane_weight) {
      p = *plane_weight->const_data_ptr<float>();
    }
  }

  // out = a text^T. In fp32 in blocks: MKL is 15% faster on an operand that stays in the second-level cache (seen on Zen 4).
  void multiply(Tensor& out, const Tensor& a) {
    const int64_t count = a.size(0);
    const int64_t row_block = is_bf16 ? count : 512;
    const int64_t column_block = is_bf16 ? m : std::max<int64_t>(64, (2 << 20) / (4 * d));
    for (int64_t i = 0; i < count; i += row_block)
      for (int64_t j = 0; j < m; j += column_block) {
        Tensor out_rows = rows(out, i, std::min(row_block, count - i)), y = rows(text, j, std::min(column_block, m - j));
        Tensor to = torch::stable::narrow(out_rows, 1, j, y.size(0));
        mm_out(to, rows(a, i, out_rows.size(0)), transpose(y, 0, 1));
      }
  }

  // Calls f(first, count) for each chunk; none crosses the end of the stored rows.
  template <class F>
  void for_chunks(F&& f) {
    for (int64_t first = 0, count = 0; first < n; first += count) {
      count = std::min(chunk, (first < stored.size(0) ? stored.size(0) : n) - first);
      f(first, count);
    }
  }

  int64_t chunks() {
    int64_t total = 0;
    for_chunks([&](int64_t, int64_t) { ++total; });
    return total;
  }

  // S of rows [first, first + count): computed, unless it is stored and `reuse` holds. The plane's product always is.
  Tensor load(int64_t first, int64_t count, bool reuse) {
    const Tensor x = rows(image, first, count);
    const bool kept = first < stored.size(0);
    Tensor s = kept ? rows(stored, first, count) : rows(scratch, 0, count);
    if (!(kept && reuse)) multiply(s, x);
    if (!plane) return s;
    const float* w = plane->const_data_ptr<float>();
    typed([&]<class T>(T*) {
      const T* from = static_cast<const T*>(x.const_data_ptr());
      T* to = static_cast<T*>(weighted.mutable_data_ptr());
      parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          for (int64_t k = 0; k < d; ++k) assign(to[i * d + k], to_float(from[i * d + k]) * w[k]);
      });
    });
    Tensor v = rows(plane_product, 0, count);
    multiply(v, rows(weighted, 0, count));
    return s;
  }

  // Calls f(strip, first row within the chunk, strip's number) in parallel over the strips of a chunk.
  template <class F>
  void for_strips(const Tensor& s, int64_t first, int64_t count, F&& f) {
    const int64_t bytes = is_bf16 ? 2 : 4;
    parallel_for(0, (count + kStripRows - 1) / kStripRows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t i = k * kStripRows;
        auto at = [&](const Tensor& t) { return static_cast<void*>(static_cast<char*>(t.mutable_data_ptr()) + i * m * bytes); };
        Strip strip{at(s), at(scratch), plane ? at(plane_product) : nullptr, std::min(kStripRows, count - i), m,
                    label_offset + first + i, ids.row.empty() ? nullptr : ids.row.data() + first + i,
                    ids.column.empty() ? nullptr : ids.column.data(), scale, p, q};
        f(strip, i, k);
      }
    });
  }

  // Calls f with a null pointer of the features' type: the type of a loop over them.
  template <class F>
  void typed(F&& f) const {
    is_bf16 ? f(static_cast<bf16*>(nullptr)) : f(static_cast<float*>(nullptr));
  }
};

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

float log_add(float a, float b) {
  const float top = std::max(a, b);
  return top == -kInf ? -kInf : top + std::log1p(std::exp(std::min(a, b) - top));
}

double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); }

// Returns terms [2] (contrastive, pair matching), row_lse [2, N], col_lse [2, M] (with and without the positive; +inf where a
// column takes no part), the number of negative pairs [1], and S of the first `stored_rows` rows.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> similarity_loss_fwd(
    const Tensor& image, const Tensor& text, const Tensor& logit_scale, const std::optional<Tensor>& plane_weight,
    const std::optional<Tensor>& plane_bias, const std::optional<Tensor>& row_ids, const std::optional<Tensor>& text_ids,
    int64_t label_offset, bool symmetric, bool contrastive, int64_t negatives, int64_t chunk,
    int64_t stored_rows) {
  Sweep sweep(image, text, logit_scale, plane_weight, plane_bias, row_ids, text_ids, label_offset, chunk,
              new_empty(image, {std::min(stored_rows, image.size(0)), text.size(0)}), false);
  const StripKernels& kernels = strip_kernels();
  const Terms terms = terms_of(contrastive, negatives);
  const bool softmax = terms != Terms::kAll, hard = terms == Terms::kSoftmaxHard;
  const int64_t n = sweep.n, m = sweep.m;
  const int64_t strips = (sweep.chunk + kStripRows - 1) / kStripRows;

  Tensor row_lse = new_empty(image, {2, n}, ScalarType::Float), col_lse = new_empty(image, {2, m}, ScalarType::Float);
  Tensor part_lse = new_empty(image, {softmax ? strips : 0, m}, ScalarType::Float);
  Tensor part_pm = new_empty(image, {hard ? strips : 0, m}, ScalarType::Float);
  Tensor col_mean = new_zeros(image, {hard ? m : 0}, ScalarType::Float);
  float *r_full = row_lse.mutable_data_ptr<float>(), *r_negative = r_full + n;
  float *c_full = col_lse.mutable_data_ptr<float>(), *c_negative = c_full + m;
  float *lse = part_lse.mutable_data_ptr<float>(), *pm = hard ? part_pm.mutable_data_ptr<float>() : nullptr;
  float* c_mean = hard ? col_mean.mutable_data_ptr<float>() : nullptr;
  std::fill_n(c_negative, m, -kInf);

  std::vector<float> row_pm(n), diagonal(n), plane_diagonal(n);
  std::vector<int64_t> dropped(n);
  sweep.for_chunks([&](int64_t first, int64_t count) {
    const Tensor s = sweep.load(first, count, false);
    sweep.for_strips(s, first, count, [&](const Strip& strip, int64_t i, int64_t k) {
      const int64_t row = first + i;
      const ForwardOut out{r_negative + row,          row_pm.data() + row, dropped.data() + row, diagonal.data() + row,
                           plane_diagonal.data() + row, lse + k * m,         hard ? pm + k * m : nullptr};
      kernels.forward(strip, out, terms, sweep.is_bf16);
    });
    if (!softmax) return;
    parallel_for(0, m, 1024, [&](int64_t begin, int64_t end) {
      kernels.merge(lse + begin, hard ? pm + begin : nullptr, (count + kStripRows - 1) / kStripRows, m, end - begin,
                    c_negative + begin, hard ? c_mean + begin : nullptr);
    });
  });

  double contrastive_sum = 0, positive = 0, negative = 0, hard_rows = 0, hard_columns = 0, pairs = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t j = label_offset + i;
    const float z = sweep.scale * diagonal[i];
    if (softmax) {
      r_full[i] = log_add(r_negative[i], z);
      contrastive_sum += softplus(double(r_negative[i]) - z);
      if (symmetric) contrastive_sum += softplus(double(c_negative[j]) - z);
    }
    positive += softplus(-plane_diagonal[i]);
    negative += row_pm[i];
    pairs += double(m - dropped[i]);
    if (hard) {
      hard_rows += row_pm[i];
      hard_columns += c_mean[j];
    }
  }
  for (int64_t j = 0; j < m; ++j) {
    const int64_t i = j - label_offset;
    const bool in_part = symmetric && i >= 0 && i < n;
    c_full[j] = in_part ? log_add(c_negative[j], sweep.scale * diagonal[i]) : kInf;
    if (!in_part) c_negative[j] = kInf;
  }
  Tensor out = new_zeros(image, {2}, ScalarType::Float), count = new_empty(image, {1}, ScalarType::Double);
  float* values = out.mutable_data_ptr<float>();
  if (contrastive) values[0] = float(contrastive_sum / (symmetric ? 2.0 * n : n));
  if (hard) values[1] = float(0.5 * (positive + (symmetric ? 0.5 * (hard_rows + hard_columns) : hard_rows)) / n);
  if (negatives == kEvery) values[1] = float(0.5 * (positive / n + negative / std::max(pairs, 1.0)));
  *count.mutable_data_ptr<double>() = pairs;
  return {out, row_lse, col_lse, count, sweep.stored};
}

// Returns the gradients of image, text (empty when not needed), logit_scale [], plane_weight and plane_bias (empty without).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> similarity_loss_bwd(
    const Tensor& grad_terms, const Tensor& image, const Tensor& text, const Tensor& logit_scale,
    const std::optional<Tensor>& plane_weight, const std::optional<Tensor>& plane_bias, const std::optional<Tensor>& row_ids,
    const std::optional<Tensor>& text_ids, const Tensor& row_lse, const Tensor& col_lse, const Tensor& negative_pairs,
    const Tensor& stored, int64_t label_offset, bool symmetric, bool contrastive, int64_t negatives, bool need_image, bool need_text,
    int64_t chunk) {
  Sweep sweep(image, text, logit_scale, plane_weight, plane_bias, row_ids, text_ids, label_offset, chunk, stored, true);
  const StripKernels& kernels = strip_kernels();
  const Terms terms = terms_of(contrastive, negatives);
  const int64_t n = sweep.n, m = sweep.m, d = sweep.d;
  const bool hadamard = sweep.plane.has_value(), many = sweep.chunks() > 1;

  const float* g = grad_terms.const_data_ptr<float>();
  const double g_contrastive = contrastive ? g[0] : 0.0, g_matching = g[1];
  const double pairs = std::max(*negative_pairs.const_data_ptr<double>(), 1.0);
  BackwardIn in{};
  in.k_row = float(g_contrastive / (symmetric ? 2.0 * n : n));
  in.k_col = symmetric ? in.k_row : 0.0f;
  in.k_positive = float(0.5 * g_matching / n);
  in.k_negative = float(0.5 * g_matching / pairs);
  in.k_hard_row = float(0.5 * g_matching / n * (symmetric ? 0.5 : 1.0));
  in.k_hard_col = symmetric ? in.k_hard_row : 0.0f;
  in.col_lse = col_lse.const_data_ptr<float>();
  in.col_lse_negative = in.col_lse + m;

  // One exponential serves both softmaxes unless a row's e^(z - r) could underflow where the column's e^(z - c) does not.
  const float* r_full = row_lse.const_data_ptr<float>();
  in.top = *std::max_element(r_full, r_full + n);
  std::vector<float> ratio;
  if (terms != Terms::kAll && in.top - *std::min_element(in.col_lse, in.col_lse + m) <= 40.0f) {
    ratio.resize(m);
    for (int64_t j = 0; j < m; ++j) ratio[j] = std::exp(in.top - in.col_lse[j]);
    in.col_ratio = ratio.data();
  }

  Tensor d_image = new_empty(image, {need_image ? n : 0, d}), d_text = new_empty(text, {need_text ? m : 0, d});
  Tensor d_scale = new_zeros(image, {}, ScalarType::Float), d_bias = new_zeros(image, {}, ScalarType::Float);
  Tensor d_weight = plane_weight ? new_zeros(*plane_weight, plane_weight->sizes()) : new_empty(image, {0}, ScalarType::Float);
  // The products of bf16 chunks are summed in fp32; d_text holds one product at a time until then.
  const bool sum_apart = need_text && many && sweep.is_bf16;
  Tensor text_sum = new_zeros(text, {sum_apart ? m : 0, d}, ScalarType::Float);
  Tensor plane_grad = new_empty(image, {hadamard ? sweep.chunk : 0, d});

  bool fresh = true;
  auto add_text = [&](const Tensor& gradient, const Tensor& x) {
    Tensor gradient_view = gradient;
    const Tensor g_t = transpose(gradient_view, 0, 1);
    fresh || sum_apart ? mm_out(d_text, g_t, x) : mm_add(d_text, g_t, x);
    fresh = false;
    if (!sum_apart) return;
    float* sum = data<float>(text_sum);
    const bf16* part = data<bf16>(d_text);
    parallel_for(0, m * d, 1 << 16,
                 [&](int64_t begin, int64_t end) { kernels.add(sum + begin, part + begin, end - begin); });
  };

  std::vector<BackwardOut> parts((sweep.chunk + kStripRows - 1) / kStripRows);
  double scale_sum = 0, p_sum = 0, q_sum = 0;
  sweep.for_chunks([&](int64_t first, int64_t count) {
    const Tensor s = sweep.load(first, count, true);
    sweep.for_strips(s, first, count, [&](const Strip& strip, int64_t i, int64_t k) {
      BackwardIn mine = in;
      mine.row_lse = row_lse.const_data_ptr<float>() + first + i;
      mine.row_lse_negative = mine.row_lse + n;
      parts[k] = kernels.backward(strip, mine, terms, sweep.is_bf16);
    });
    for (int64_t k = 0; k < (count + kStripRows - 1) / kStripRows; ++k) {
      scale_sum += parts[k].scale;
      p_sum += parts[k].p;
      q_sum += parts[k].q;
    }
    const Tensor g_sim = rows(sweep.scratch, 0, count), x = rows(image, first, count);
    if (need_image) {
      Tensor to = rows(d_image, first, count);
      mm_out(to, g_sim, text);
    }
    if (need_text) add_text(g_sim, x);
    if (!hadamard) return;
    const Tensor h = rows(sweep.plane_product, 0, count);
    Tensor hy = rows(plane_grad, 0, count);
    mm_out(hy, h, text);
    const float* w = sweep.plane->const_data_ptr<float>();
    float* dw = d_weight.mutable_data_ptr<float>();
    sweep.typed([&]<class T>(T*) {
      const T *xs = data<T>(x), *hys = data<T>(hy);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t k = 0; k < d; ++k) dw[k] += to_float(xs[i * d + k]) * to_float(hys[i * d + k]);
      if (!need_image) return;
      T* to = data<T>(d_image) + first * d;
      parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          for (int64_t k = 0; k < d; ++k) {
            const int64_t at = i * d + k;
            assign(to[at], to_float(to[at]) + w[k] * to_float(hys[at]));
          }
      });
    });
    if (need_text) add_text(h, rows(sweep.weighted, 0, count));
  });
  if (sum_apart) {
    const float* sum = data<float>(text_sum);
    bf16* to = data<bf16>(d_text);
    parallel_for(0, m * d, 1 << 16,
                 [&](int64_t begin, int64_t end) { kernels.round(to + begin, sum + begin, end - begin); });
  }
  *d_scale.mutable_data_ptr<float>() = float(scale_sum);
  *d_bias.mutable_data_ptr<float>() = float(q_sum);
  if (plane_weight && !hadamard) *d_weight.mutable_data_ptr<float>() = float(p_sum);
  return {d_image, d_text, d_scale, d_weight, d_bias};
}

STABLE_TORCH_LIBRARY_IMPL(simplclip, CPU, m) {
  m.impl("similarity_loss_fwd_cpu", TORCH_BOX(&similarity_loss_fwd));
  m.impl("similarity_loss_bwd_cpu", TORCH_BOX(&similarity_loss_bwd));
}

}  // namespace
}  // namespace simplclip
