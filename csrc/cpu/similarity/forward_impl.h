// Included after sigmoid_impl.h, inside the namespace of an instruction set: forward of a strip.

// Makes `top` the reference of the column sums if it is higher, and rescales the sums.
inline void rescale_columns(float& reference, float top, int64_t columns, float* sums, float* weighted) {
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
    rescale_columns(reference, tile_top, columns, sums, col_weighted);
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
template <class T, bool has_teacher, int R>
void forward_tile(const Strip& s, const ForwardOut& out, int64_t i0, Reference& reference) {
  float* const col_lse = out.columns[RowStat::kLseStudent];
  float* const col_teacher_lse = out.columns[RowStat::kLseTeacher];
  float* const col_mean = out.columns[RowStat::kMean];
  RowSums<R> student;
  WeightedRowSums<R> teacher;

  vf highest_z[R], highest_t[R];
  for (int r = 0; r < R; ++r) highest_z[r] = highest_t[r] = splat(-kInf);
  for_blocks(s, i0, R, [&](int64_t j, auto lanes, auto masked) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vi drop = masked ? dropped_lanes(s, i0 + r, j, lanes) : vi{};
      auto keep_top = [&](vf& top, vf logit) { top = max(top, drop ? splat(-kInf) : logit); };
      keep_top(highest_z[r], s.scale * load_block<T>(s.sim, s, i0 + r, j, lanes));
      if constexpr (has_teacher) keep_top(highest_t[r], s.teacher_scale * load_block<T>(s.teacher, s, i0 + r, j, lanes));
    }
  });
  student.set_tops(highest_z, reference.student, s.columns, col_lse, nullptr);
  if constexpr (has_teacher) teacher.set_tops(highest_t, reference.teacher, s.columns, col_teacher_lse, col_mean);

  for_blocks(s, i0, R, [&](int64_t j, auto lanes, auto masked) __attribute__((always_inline)) {
    vf col_sum = {}, col_teacher_sum = {}, col_weighted = {};
    if (col_lse) {
      col_sum = load(col_lse + j, lanes);
      if constexpr (has_teacher) col_teacher_sum = load(col_teacher_lse + j, lanes);
      if constexpr (has_teacher) col_weighted = load(col_mean + j, lanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vf sim = load_block<T>(s.sim, s, i0 + r, j, lanes);
      const vi drop = masked ? dropped_lanes(s, i0 + r, j, lanes) : vi{};
      const vf e = drop ? vf{} : exp_of_logit<T, masked || has_teacher>(scaled(s.scale, sim) - student.top[r]);
      student.total[r] += e;
      col_sum += student.weight[r] * e;
      if constexpr (has_teacher) {
        const vf t = scaled(s.teacher_scale, load_block<T>(s.teacher, s, i0 + r, j, lanes));
        const vf e_t = drop ? vf{} : exp(t - teacher.top[r]);
        const vf value = e_t * (s.entropy * t - s.scale * sim);
        teacher.total[r] += e_t;
        teacher.weighted[r] += value;
        col_teacher_sum += teacher.weight[r] * e_t;
        col_weighted += teacher.weight[r] * value;
      }
    }
    if (col_lse) {
      store(col_lse + j, col_sum, lanes);
      if constexpr (has_teacher) store(col_teacher_lse + j, col_teacher_sum, lanes);
      if constexpr (has_teacher) store(col_mean + j, col_weighted, lanes);
    }
  });

  for (int r = 0; r < R; ++r) {
    const int64_t i = i0 + r, positive = i * s.columns + s.label + i;
    out.rows[RowStat::kLseStudent][i] = student.lse(r);
    out.rows[RowStat::kDiagonalStudent][i] = to_float(static_cast<const T*>(s.sim)[positive]);
    if constexpr (has_teacher) {
      out.rows[RowStat::kLseTeacher][i] = teacher.lse(r);
      out.rows[RowStat::kMean][i] = teacher.mean(r);
      out.rows[RowStat::kDiagonalTeacher][i] = to_float(static_cast<const T*>(s.teacher)[positive]);
    }
    if (out.plane) {
      const SigmoidTerm plane = {out.plane[0], out.plane[1], 1, 0};
      SigmoidSums sums{};
      sigmoid_row<T, 1, false>(s, &plane, i, static_cast<T*>(nullptr), sums);
      out.rows[RowStat::kPairMatching][i] = float(sums.negative[0]);
    }
  }
}

// Turns column sums of the student's or the teacher's softmax, relative to `reference`, into log-sum-exps, and the teacher's
// weighted sums into means. A sum that may have lost terms is computed again relative to its own column's highest logit.
template <class T, bool has_teacher>
VINLINE void finish_columns(const Strip& s, float reference, float* sums, float* weighted = nullptr) {
  auto student_logit = [&](int64_t i, int64_t j, int lanes) { return scaled(s.scale, load_block<T>(s.sim, s, i, j, lanes)); };
  auto logit = [&](int64_t i, int64_t j, int lanes) {
    if constexpr (has_teacher) return scaled(s.teacher_scale, load_block<T>(s.teacher, s, i, j, lanes));
    return student_logit(i, j, lanes);
  };
  for (int64_t j = 0; j < s.columns; j += W) {
    const int lanes = int(least<int64_t>(W, s.columns - j));
    vf top = splat(reference), total = load(sums + j, lanes), mean = {};
    if constexpr (has_teacher) mean = load(weighted + j, lanes);
    if (any((total < kLostBelow) & (iota() < lanes))) {
      top = splat(-kInf);
      total = mean = vf{};
      for (int64_t i = 0; i < s.rows; ++i) top = max(top, dropped_lanes(s, i, j, lanes) ? splat(-kInf) : logit(i, j, lanes));
      top = top == -kInf ? vf{} : top;
      for (int64_t i = 0; i < s.rows; ++i) {
        const vf e = dropped_lanes(s, i, j, lanes) ? vf{} : exp(logit(i, j, lanes) - top);
        total += e;
        if constexpr (has_teacher) mean += e * (s.entropy * logit(i, j, lanes) - student_logit(i, j, lanes));
      }
    }
    store(sums + j, lse_of(total, top), lanes);
    if constexpr (has_teacher) store(weighted + j, total == 0.0f ? vf{} : mean / total, lanes);
  }
}

template <class T, bool has_teacher>
void forward_strip(const Strip& s, const ForwardOut& out) {
  constexpr int R = has_teacher ? kTileRows / 2 : kTileRows;
  if (out.columns.first) std::fill_n(out.columns.first, (has_teacher ? 3 : 1) * s.columns, 0.0f);
  Reference reference;
  int64_t i = 0;
  for (; i + R <= s.rows; i += R) forward_tile<T, has_teacher, R>(s, out, i, reference);
  for (; i < s.rows; ++i) forward_tile<T, has_teacher, 1>(s, out, i, reference);
  if (!out.columns.first) return;
  finish_columns<T, false>(s, reference.student, out.columns[RowStat::kLseStudent]);
  if constexpr (has_teacher)
    finish_columns<T, true>(s, reference.teacher, out.columns[RowStat::kLseTeacher], out.columns[RowStat::kMean]);
}

void forward(const Strip& s, const ForwardOut& out, bool is_bf16) {
  by_value<false, true>(is_bf16, [&](auto is_bf16) {
    by_value<false, true>(s.teacher != nullptr, [&](auto has_teacher) {
      forward_strip<std::conditional_t<is_bf16(), bf16, float>, has_teacher()>(s, out);
    });
  });
}
