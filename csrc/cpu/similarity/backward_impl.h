// Included after strip_impl.h, inside the namespace of an instruction set: backward of a strip.

// Gradient of one softmax term: of the row by (lse, g), of column j by (col_lse, g_col), or by one exponential with the ratio.
template <Softmax kind>
struct SoftmaxGradient {
  float lse, g, shift;                     // this row's log-sum-exp, its gradient, e^(lse - top)
  const float *col_lse, *g_col, *ratio;    // [M]

  SoftmaxGradient(float lse, float g, float top, const float* col_lse, const float* g_col, const float* ratio)
      : lse(lse), g(g), shift(kind == Softmax::kShared ? std::exp(lse - top) : 0.0f), col_lse(col_lse), g_col(g_col),
        ratio(ratio) {}

  // `z`: logits; `e` returns e^(z - lse) if the kind has it.
  VINLINE vf operator()(vf z, int64_t j, int lanes, bool masked, vf& e, vf& e_col) const {
    if constexpr (kind != Softmax::kColumns) e = exp(z - lse);
    if constexpr (kind == Softmax::kShared) return e * (shift * load_column(ratio, j, lanes, masked) + g);
    if constexpr (kind == Softmax::kRows) return g * e;
    e_col = exp(z - load_column(col_lse, j, lanes, masked));
    const vf by_column = load_column(g_col, j, lanes, masked) * e_col;
    if constexpr (kind == Softmax::kColumns) return by_column;
    return g * e + by_column;
  }
};

template <class T, Terms terms, bool teacher, Softmax kind>
BackwardOut backward_strip(const Strip& s, const BackwardIn& in) {
  constexpr bool softmax = terms != Terms::kAll;
  constexpr bool hard = terms == Terms::kSoftmaxHard;
  constexpr bool matching = terms != Terms::kSoftmax;
  BackwardOut total = {0, 0, 0};
  for (int64_t i = 0; i < s.rows; ++i) {
    const T* sim_row = static_cast<const T*>(s.sim) + i * s.columns;
    const T* teacher_row = teacher ? static_cast<const T*>(s.teacher) + i * s.columns : nullptr;
    T* grad_row = static_cast<T*>(s.grad) + i * s.columns;
    T* plane_row = s.plane ? static_cast<T*>(s.plane) + i * s.columns : nullptr;
    const int64_t label = s.label + i;
    const bool rows = softmax && kind != Softmax::kColumns;
    const SoftmaxGradient<kind> student(rows ? in.lse[i] : 0, rows ? in.g_lse[i] : 0, in.top, in.col_lse, in.g_col_lse,
                                        in.lse_ratio);
    const SoftmaxGradient<kind> tutor(rows && teacher ? in.teacher_lse[i] : 0, rows && teacher ? in.g_mean[i] : 0,
                                      in.teacher_top, in.col_teacher_lse, in.g_col_mean, in.teacher_ratio);
    const float g_match = matching ? in.g_match[i] : 0.0f;
    vf d_scale = {}, d_p = {}, d_q = {};

    for_blocks(s.columns, label, 1, s.ids != nullptr, [&](int64_t j, int lanes, auto masked) __attribute__((always_inline)) {
      auto row = [&](const T* p) __attribute__((always_inline)) { return masked ? load(p + j, lanes) : load(p + j); };
      const vf sim = row(sim_row), z = s.scale * sim;
      vi drop = {};
      if constexpr (masked) drop = dropped_lanes(s, i, j, lanes);
      vf g = {}, h = {}, e = {}, e_col = {};
      if constexpr (softmax) g = student(z, j, lanes, masked, e, e_col);
      if constexpr (teacher) {
        vf e_t, e_t_col;
        g -= tutor(s.teacher_scale * row(teacher_row), j, lanes, masked, e_t, e_t_col);
      }
      if constexpr (softmax) {
        if constexpr (masked) g = drop ? vf{} : g;
        d_scale += g * sim;
        g *= s.grad_scale;
      }
      if constexpr (matching) {
        const vf v = plane_row ? row(plane_row) : sim;
        h = sigmoid(plane_row ? v + s.q : s.p * v + s.q);
        if constexpr (!hard)
          h *= g_match;
        else if constexpr (kind == Softmax::kShared)
          h *= e * (student.shift * load_column(in.match_ratio, j, lanes, masked) + g_match);
        else if constexpr (kind == Softmax::kRows)
          h *= g_match * e;
        else
          h *= g_match * e + load_column(in.g_col_match, j, lanes, masked) * e_col;
        if constexpr (masked) h = drop ? vf{} : h;
        d_p += h * v;
        d_q += h;
        if (plane_row)
          masked ? store(plane_row + j, h, lanes) : store(plane_row + j, h);
        else
          g += s.p * h;
      }
      masked ? store(grad_row + j, g, lanes) : store(grad_row + j, g);
    });
    store(grad_row + label, splat(in.g_diagonal[i]), 1);
    if (plane_row) store(plane_row + label, splat(in.g_plane_diagonal[i]), 1);
    total.scale += double(sum(d_scale));
    total.p += double(sum(d_p));
    total.q += double(sum(d_q));
  }
  return total;
}

template <class T, bool teacher, Softmax kind>
BackwardOut backward_of(const Strip& s, const BackwardIn& in, Terms terms) {
  switch (terms) {
    case Terms::kSoftmax: return backward_strip<T, Terms::kSoftmax, teacher, kind>(s, in);
    case Terms::kSoftmaxAll: return backward_strip<T, Terms::kSoftmaxAll, teacher, kind>(s, in);
    case Terms::kSoftmaxHard: return backward_strip<T, Terms::kSoftmaxHard, teacher, kind>(s, in);
    default: return backward_strip<T, Terms::kAll, false, Softmax::kRows>(s, in);
  }
}

template <class T, bool teacher>
BackwardOut backward_by(const Strip& s, const BackwardIn& in, Terms terms, Softmax kind) {
  switch (kind) {
    case Softmax::kShared: return backward_of<T, teacher, Softmax::kShared>(s, in, terms);
    case Softmax::kApart: return backward_of<T, teacher, Softmax::kApart>(s, in, terms);
    case Softmax::kRows: return backward_of<T, teacher, Softmax::kRows>(s, in, terms);
    default: return backward_strip<T, Terms::kSoftmax, teacher, Softmax::kColumns>(s, in);
  }
}

BackwardOut backward(const Strip& s, const BackwardIn& in, Terms terms, Softmax kind, bool is_bf16) {
  if (s.teacher)
    return is_bf16 ? backward_by<bf16, true>(s, in, terms, kind) : backward_by<float, true>(s, in, terms, kind);
  return is_bf16 ? backward_by<bf16, false>(s, in, terms, kind) : backward_by<float, false>(s, in, terms, kind);
}
