// Included after sigmoid_impl.h, inside the namespace of an instruction set: backward of a strip.

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
    const vf e = exp_of_logit<T, exact>(z - lse);
    if constexpr (kind == Softmax::kShared) return e * (shift * load(ratio + j, lanes) + g);
    if constexpr (kind == Softmax::kRows) return g * e;
    const vf by_column = load(g_col + j, lanes) * exp_of_logit<T, exact>(z - load(col_lse + j, lanes));
    return g * e + by_column;
  }
};

template <class T, bool has_teacher, Softmax kind, bool has_plane>
BackwardOut backward_strip(const Strip& s, const BackwardIn& in) {
  constexpr bool coarse = std::is_same_v<T, bf16>;
  const float p = has_plane ? in.plane[0] : 0.0f, q = has_plane ? in.plane[1] : 0.0f;
  BackwardOut total{};
  for (int64_t i = 0; i < s.rows; ++i) {
    T* const grad_row = static_cast<T*>(s.grad) + i * s.columns;
    const SoftmaxGradient<kind> student(in.rows[RowStat::kLseStudent][i], in.g_rows[RowStat::kLseStudent][i], in.top,
                                        in.columns[RowStat::kLseStudent], in.g_columns[RowStat::kLseStudent], in.ratio);
    const SoftmaxGradient<kind> teacher(in.rows[RowStat::kLseTeacher][i], in.g_rows[RowStat::kMean][i], in.teacher_top,
                                        in.columns[RowStat::kLseTeacher], in.g_columns[RowStat::kMean], in.teacher_ratio);
    const float g_plane = in.g_rows[RowStat::kPairMatching][i];
    vf d_scale = {}, d_p = {}, d_q = {};

    for_blocks(s, i, 1, [&](int64_t j, auto lanes, auto masked) __attribute__((always_inline)) {
      const vf sim = load_block<T>(s.sim, s, i, j, lanes), z = scaled(s.scale, sim);
      const vi drop = masked ? dropped_lanes(s, i, j, lanes) : vi{};
      vf g = student.template of<T, masked || has_teacher>(z, j, lanes);
      if constexpr (has_teacher)
        g -= teacher.template of<T, true>(scaled(s.teacher_scale, load_block<T>(s.teacher, s, i, j, lanes)), j, lanes);
      g = drop ? vf{} : g;
      d_scale += g * sim;
      g *= s.scale;
      if constexpr (has_plane) {
        const vf t = max(splat(-126.0f), kLog2E * p * sim + kLog2E * q);  // l / log(2), so that e^-l is finite; a NaN stays one
        vf h = inverse_of<coarse>(exp2<coarse>(-t) + 1.0f);  // sigmoid(l)
        h = drop ? vf{} : h;
        d_p += h * sim;
        d_q += h;
        g += g_plane * p * h;
      }
      store(grad_row + j, g, lanes);
    });
    store(grad_row + s.label + i, splat(in.g_rows[RowStat::kDiagonalStudent][i]), 1);
    total.scale += double(sum(d_scale));
    total.plane[0] += double(g_plane) * sum(d_p);
    total.plane[1] += double(g_plane) * sum(d_q);
  }
  return total;
}

BackwardOut backward(const Strip& s, const BackwardIn& in, Softmax kind, bool is_bf16) {
  using enum Softmax;
  return by_value<false, true>(is_bf16, [&](auto is_bf16) {
    return by_value<false, true>(s.teacher != nullptr, [&](auto has_teacher) {
      return by_value<kShared, kApart, kRows>(kind, [&](auto kind) {
        return by_value<false, true>(in.plane != nullptr, [&](auto has_plane) {
          return backward_strip<std::conditional_t<is_bf16(), bf16, float>, has_teacher(), kind(), has_plane()>(s, in);
        });
      });
    });
  });
}
