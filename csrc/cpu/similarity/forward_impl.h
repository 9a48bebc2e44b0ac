// Included after strip_impl.h, inside the namespace of an instruction set: forward of a strip.

// Raises the reference of the column sums to `top` if `top` is higher, and rescales the sums.
inline void raise(float& reference, float top, int64_t columns, float* sums, float* weighted) {
  if (!(top > reference)) return;
  if (reference > -kInf && sums) {
    const float shrink = std::exp(reference - top);
    for (int64_t j = 0; j < columns; ++j) sums[j] *= shrink;
    if (weighted)
      for (int64_t j = 0; j < columns; ++j) weighted[j] *= shrink;
  }
  reference = top;
}

// The references of a strip's column sums, which hold sum_i e^(z_ij - reference).
struct Reference {
  float student = -kInf, teacher = -kInf;
};

// Running sums of e^(z - top) of R rows, where `top` is the row's highest logit.
template <int R>
struct RowSums {
  float top[R], weight[R];  // weight: e^(top - reference)
  vf total[R] = {};

  void set_tops(const vf* highest_of, float& reference, int64_t columns, float* sums, float* col_weighted) {
    float tile_top = reference;
    for (int r = 0; r < R; ++r) {
      top[r] = highest(highest_of[r]);
      if (top[r] > tile_top) tile_top = top[r];
    }
    raise(reference, tile_top, columns, sums, col_weighted);
    for (int r = 0; r < R; ++r) {
      weight[r] = top[r] > -kInf ? std::exp(top[r] - reference) : 0.0f;
      if (top[r] == -kInf) top[r] = 0.0f;  // a row without negatives: every lane is masked
    }
  }

  float lse(int r) const {
    const float sum_r = sum(total[r]);
    return sum_r > 0 ? top[r] + std::log(sum_r) : (sum_r == 0 ? -kInf : sum_r);
  }
};

// RowSums of the teacher's softmax, with the running sums of a value that this softmax weights.
template <int R>
struct WeightedRowSums : RowSums<R> {
  vf weighted[R] = {};

  float mean(int r) const {
    const float sum_r = sum(this->total[r]);
    return sum_r == 0 ? 0.0f : sum(weighted[r]) / sum_r;
  }
};

// Computes the statistics of rows i0 to i0 + R - 1 of a strip, and adds the rows to the column sums.
template <class T, bool teacher, int R>
void forward_tile(const Strip& s, const ForwardOut& out, int64_t i0, Reference& reference) {
  const bool mask_all = everywhere(s.pairs), columns = out.col_lse != nullptr;
  const int64_t label = s.pairs.label + i0;
  RowSums<R> student;
  WeightedRowSums<R> tutor;

  vf highest_z[R], highest_t[R];
  for (int r = 0; r < R; ++r) highest_z[r] = highest_t[r] = splat(-kInf);
  for_blocks(s.columns, label, R, mask_all, [&](int64_t j, auto lanes, auto masked) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vi drop = masked ? dropped_lanes(s, i0 + r, j, lanes) : vi{};
      auto keep_top = [&](vf& top, vf logit) { top = max(top, drop ? splat(-kInf) : logit); };
      keep_top(highest_z[r], s.scale * load_block<T>(s.sim, s, i0 + r, j, lanes));
      if constexpr (teacher) keep_top(highest_t[r], s.teacher_scale * load_block<T>(s.teacher, s, i0 + r, j, lanes));
    }
  });
  student.set_tops(highest_z, reference.student, s.columns, out.col_lse, nullptr);
  if constexpr (teacher) tutor.set_tops(highest_t, reference.teacher, s.columns, out.col_teacher_lse, out.col_mean);

  for_blocks(s.columns, label, R, mask_all, [&](int64_t j, auto lanes, auto masked) __attribute__((always_inline)) {
    vf col_sum = {}, col_tutor = {}, col_mean = {};
    if (columns) {
      col_sum = load(out.col_lse + j, lanes);
      if constexpr (teacher) col_tutor = load(out.col_teacher_lse + j, lanes);
      if constexpr (teacher) col_mean = load(out.col_mean + j, lanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vf sim = load_block<T>(s.sim, s, i0 + r, j, lanes);
      const vi drop = masked ? dropped_lanes(s, i0 + r, j, lanes) : vi{};
      const vf e = drop ? vf{} : exp_of_logit<T, masked || teacher>(s.scale * sim - student.top[r]);
      student.total[r] += e;
      col_sum += student.weight[r] * e;
      if constexpr (teacher) {
        const vf t = s.teacher_scale * load_block<T>(s.teacher, s, i0 + r, j, lanes);
        const vf e_t = drop ? vf{} : exp(t - tutor.top[r]);
        const vf value = e_t * (s.entropy * t - s.scale * sim);
        tutor.total[r] += e_t;
        tutor.weighted[r] += value;
        col_tutor += tutor.weight[r] * e_t;
        col_mean += tutor.weight[r] * value;
      }
    }
    if (columns) {
      store(out.col_lse + j, col_sum, lanes);
      if constexpr (teacher) store(out.col_teacher_lse + j, col_tutor, lanes);
      if constexpr (teacher) store(out.col_mean + j, col_mean, lanes);
    }
  });

  for (int r = 0; r < R; ++r) {
    const int64_t i = i0 + r, at = i * s.columns + s.pairs.label + i;
    if (out.lse) out.lse[i] = student.lse(r);
    if (teacher && out.teacher_lse) {
      out.teacher_lse[i] = tutor.lse(r);
      out.mean[i] = tutor.mean(r);
      out.teacher_diagonal[i] = to_float(static_cast<const T*>(s.teacher)[at]);
    }
    out.diagonal[i] = to_float(static_cast<const T*>(s.sim)[at]);
    if (out.sigmoids.count) {
      SigmoidOut sums{};
      sigmoid_row<T, Sigmoid::kValues>(s, out.sigmoids, i, static_cast<float*>(nullptr), sums);
      for (int k = 0; k < out.sigmoids.count; ++k) {
        const SigmoidTerm& term = out.sigmoids.terms[k];
        out.sigmoid[k][i] = float(term.negative * sums.negative[k] + term.positive * sums.positive[k]);
      }
    }
  }
}

// Turns column sums of the student's or the teacher's softmax, relative to `reference`, into log-sum-exps, and the teacher's
// weighted sums into means. A sum that may have lost terms is computed again relative to its own column's highest logit.
template <class T, bool teacher>
VINLINE void finish_columns(const Strip& s, float reference, float* sums, float* weighted = nullptr) {
  auto student_logit = [&](int64_t i, int64_t j, int lanes) { return s.scale * load_block<T>(s.sim, s, i, j, lanes); };
  auto logit = [&](int64_t i, int64_t j, int lanes) {
    if constexpr (teacher) return s.teacher_scale * load_block<T>(s.teacher, s, i, j, lanes);
    return student_logit(i, j, lanes);
  };
  for (int64_t j = 0; j < s.columns; j += W) {
    const int lanes = int(least<int64_t>(W, s.columns - j));
    vf top = splat(reference), total = load(sums + j, lanes), mean = {};
    if constexpr (teacher) mean = load(weighted + j, lanes);
    if (any((total < kLostBelow) & (iota() < lanes))) {
      top = splat(-kInf);
      total = mean = vf{};
      for (int64_t i = 0; i < s.rows; ++i) top = max(top, dropped_lanes(s, i, j, lanes) ? splat(-kInf) : logit(i, j, lanes));
      top = top == -kInf ? vf{} : top;
      for (int64_t i = 0; i < s.rows; ++i) {
        const vf e = dropped_lanes(s, i, j, lanes) ? vf{} : exp(logit(i, j, lanes) - top);
        total += e;
        if constexpr (teacher) mean += e * (s.entropy * logit(i, j, lanes) - student_logit(i, j, lanes));
      }
    }
    store(sums + j, lse_of(total, top), lanes);
    if constexpr (teacher) store(weighted + j, total == 0.0f ? vf{} : mean / total, lanes);
  }
}

template <class T, bool teacher>
void forward_strip(const Strip& s, const ForwardOut& out) {
  constexpr int R = teacher ? kTileRows / 2 : kTileRows;
  const bool columns = out.col_lse != nullptr;
  float* const sums[] = {out.col_lse, teacher ? out.col_teacher_lse : nullptr, teacher ? out.col_mean : nullptr};
  for (float* sum : sums)
    if (columns && sum) std::memset(sum, 0, s.columns * sizeof(float));
  Reference reference;
  int64_t i = 0;
  for (; i + R <= s.rows; i += R) forward_tile<T, teacher, R>(s, out, i, reference);
  for (; i < s.rows; ++i) forward_tile<T, teacher, 1>(s, out, i, reference);
  if (!columns) return;
  finish_columns<T, false>(s, reference.student, out.col_lse);
  if constexpr (teacher) finish_columns<T, true>(s, reference.teacher, out.col_teacher_lse, out.col_mean);
}

void forward(const Strip& s, const ForwardOut& out, bool is_bf16) {
  by_value<false, true>(is_bf16, [&](auto is_bf16) {
    by_value<false, true>(s.teacher != nullptr,
                          [&](auto teacher) { forward_strip<std::conditional_t<is_bf16(), bf16, float>, teacher()>(s, out); });
  });
}
