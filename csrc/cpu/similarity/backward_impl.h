// Included after strip_impl.h, inside the namespace of an instruction set: backward of a strip.

// The gradient of one softmax term with respect to the logits z of a row: g e^(z - lse) by the row's softmax, plus
// g_col e^(z - col_lse) by the softmax of column j. kShared computes both from one exponential and `ratio`.
template <Softmax kind>
struct SoftmaxGradient {
  float lse, g, shift;                     // this row's log-sum-exp, its gradient, e^(lse - top)
  const float *col_lse, *g_col, *ratio;    // [M]

  SoftmaxGradient(float lse, float g, float top, const float* col_lse, const float* g_col, const float* ratio)
      : lse(lse), g(g), shift(kind == Softmax::kShared ? std::exp(lse - top) : 0.0f), col_lse(col_lse), g_col(g_col),
        ratio(ratio) {}

  template <class T, bool exact, class Lanes>
  VINLINE vf of(vf z, int64_t j, Lanes lanes) const {  // z: logits
    vf e;
    if constexpr (kind != Softmax::kColumns) e = exp_of_logit<T, exact>(z - lse);
    if constexpr (kind == Softmax::kShared) return e * (shift * load(ratio + j, lanes) + g);
    if constexpr (kind == Softmax::kRows) return g * e;
    const vf by_column = load(g_col + j, lanes) * exp_of_logit<T, exact>(z - load(col_lse + j, lanes));
    if constexpr (kind == Softmax::kColumns) return by_column;
    return g * e + by_column;
  }
};

template <class T, bool teacher, Softmax kind>
BackwardOut backward_strip(const Strip& s, const BackwardIn& in) {
  BackwardOut total{};
  for (int64_t i = 0; i < s.rows; ++i) {
    const T* sim_row = static_cast<const T*>(s.sim) + i * s.columns;
    const T* teacher_row = teacher ? static_cast<const T*>(s.teacher) + i * s.columns : nullptr;
    T* grad_row = static_cast<T*>(s.grad) + i * s.columns;
    const int64_t label = s.pairs.label + i;
    const bool rows = kind != Softmax::kColumns;
    const SoftmaxGradient<kind> student(rows ? in.lse[i] : 0, rows ? in.g_lse[i] : 0, in.top, in.col_lse, in.g_col_lse,
                                        in.lse_ratio);
    const SoftmaxGradient<kind> tutor(rows && teacher ? in.teacher_lse[i] : 0, rows && teacher ? in.g_mean[i] : 0,
                                      in.teacher_top, in.col_teacher_lse, in.g_col_mean, in.teacher_ratio);
    const float* const sigmoid_row_grad = in.sigmoids.count ? in.sigmoid_grad : nullptr;
    if (sigmoid_row_grad) {
      SigmoidIn sigmoids = in.sigmoids;
      for (int k = 0; k < sigmoids.count; ++k) {
        sigmoids.terms[k].negative *= in.g_sigmoid[k][i];
        sigmoids.terms[k].positive *= in.g_sigmoid[k][i];
      }
      sigmoid_row<T, Sigmoid::kGradient>(s, sigmoids, i, in.sigmoid_grad, total.sigmoids);
    }
    vf d_scale = {};

    for_blocks(s.columns, label, 1, everywhere(s.pairs), [&](int64_t j, auto lanes, auto masked) __attribute__((always_inline)) {
      const vf sim = load(sim_row + j, lanes), z = s.scale * sim;
      const vi drop = masked ? dropped_lanes(s, i, j, lanes) : vi{};
      vf g = student.template of<T, masked || teacher>(z, j, lanes);
      if constexpr (teacher) g -= tutor.template of<T, true>(s.teacher_scale * load(teacher_row + j, lanes), j, lanes);
      g = drop ? vf{} : g;
      d_scale += g * sim;
      g *= s.grad_scale;
      if (sigmoid_row_grad) g += load(sigmoid_row_grad + j, lanes);
      store(grad_row + j, g, lanes);
    });
    store(grad_row + label, splat(in.g_diagonal[i] + (sigmoid_row_grad ? sigmoid_row_grad[label] : 0.0f)), 1);
    total.scale += double(sum(d_scale));
  }
  return total;
}

BackwardOut backward(const Strip& s, const BackwardIn& in, Softmax kind, bool is_bf16) {
  using enum Softmax;
  return by_value<false, true>(is_bf16, [&](auto is_bf16) {
    return by_value<false, true>(s.teacher != nullptr, [&](auto teacher) {
      return by_value<kShared, kApart, kRows, kColumns>(kind, [&](auto kind) {
        return backward_strip<std::conditional_t<is_bf16(), bf16, float>, teacher(), kind()>(s, in);
      });
    });
  });
}
