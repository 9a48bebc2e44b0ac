// Included after vec.h, inside the namespace of an instruction set. See similarity_strip.h.

constexpr float kInf = std::numeric_limits<float>::infinity();
// A column sum below this may have lost terms that underflowed against the strip's reference: it is then summed afresh.
constexpr float kLostBelow = 1e-28f;

// Calls f(j, lanes, masked) for every block of W columns; masked is true where a lane may have to be dropped.
template <class F>
VINLINE void for_blocks(int64_t columns, int64_t first_label, int64_t labels, bool mask_all, F&& f) {
  const int64_t full = columns / W * W;
  const int64_t lo = mask_all ? 0 : least(first_label / W * W, full);
  const int64_t hi = mask_all ? full : least((first_label + labels + W - 1) / W * W, full);
  int64_t j = 0;
  for (; j < lo; j += W) f(j, W, std::false_type{});
  for (; j < hi; j += W) f(j, W, std::true_type{});
  for (; j < full; j += W) f(j, W, std::false_type{});
  if (full < columns) f(full, int(columns - full), std::true_type{});
}

// Lanes of block j that are no negatives of row i.
VINLINE vi dropped_lanes(const Strip& s, int64_t i, int64_t j, int lanes) {
  const vi lane = iota();
  vi drop = (lane + int32_t(j)) == int32_t(s.label + i);
  if (s.ids) drop |= load(s.text_ids + j, lanes) == s.ids[i];
  if (lanes < W) drop |= lane >= lanes;
  return drop;
}

template <class T>
VINLINE vf load_block(const void* base, const Strip& s, int64_t i, int64_t j, int lanes, bool masked) {
  const T* p = static_cast<const T*>(base) + i * s.columns + j;
  return masked ? load(p, lanes) : load(p);
}

// One tile of R rows of a strip. `reference` is the strip's K: column sums hold sum_i e^(z_ij - K).
template <class T, Terms terms, int R>
void forward_tile(const Strip& s, const ForwardOut& out, int64_t i0, float& reference) {
  constexpr bool softmax = terms != Terms::kAll;
  constexpr bool hard = terms == Terms::kSoftmaxHard;
  constexpr bool matching = terms != Terms::kSoftmax;
  const bool mask_all = s.ids != nullptr;
  const int64_t label = s.label + i0;
  float top[R], weight[R];

  if constexpr (softmax) {
    vf highest_z[R];
    for (int r = 0; r < R; ++r) highest_z[r] = splat(-kInf);
    for_blocks(s.columns, label, R, mask_all, [&](int64_t j, int lanes, auto masked) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        vf z = s.scale * load_block<T>(s.sim, s, i0 + r, j, lanes, masked);
        if constexpr (masked) z = dropped_lanes(s, i0 + r, j, lanes) ? splat(-kInf) : z;
        highest_z[r] = max(highest_z[r], z);
      }
    });
    float tile_top = reference;
    for (int r = 0; r < R; ++r) {
      top[r] = highest(highest_z[r]);
      if (top[r] > tile_top) tile_top = top[r];
    }
    if (tile_top > reference) {
      if (reference > -kInf) {
        const float shrink = std::exp(reference - tile_top);
        for (int64_t j = 0; j < s.columns; ++j) out.col_lse[j] *= shrink;
        if constexpr (hard)
          for (int64_t j = 0; j < s.columns; ++j) out.col_pm[j] *= shrink;
      }
      reference = tile_top;
    }
    for (int r = 0; r < R; ++r) {
      weight[r] = top[r] > -kInf ? std::exp(top[r] - reference) : 0.0f;
      if (top[r] == -kInf) top[r] = 0.0f;  // a row without negatives: every lane is dropped below
    }
  }

  vf row_sum[R] = {}, row_pm[R] = {};
  vi dropped[R] = {};
  for_blocks(s.columns, label, R, mask_all, [&](int64_t j, int lanes, auto masked) __attribute__((always_inline)) {
    vf col_sum = {}, col_pm = {};
    if constexpr (softmax) col_sum = masked ? load(out.col_lse + j, lanes) : load(out.col_lse + j);
    if constexpr (hard) col_pm = masked ? load(out.col_pm + j, lanes) : load(out.col_pm + j);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vf sim = load_block<T>(s.sim, s, i0 + r, j, lanes, masked);
      vi drop = {};
      if constexpr (masked) {
        drop = dropped_lanes(s, i0 + r, j, lanes);
        dropped[r] -= drop & (iota() < lanes);
      }
      vf e = {}, match = {};
      if constexpr (softmax) {
        e = exp(s.scale * sim - top[r]);
        if constexpr (masked) e = drop ? vf{} : e;
        row_sum[r] += e;
        col_sum += weight[r] * e;
      }
      if constexpr (matching) {
        const vf l = s.plane ? load_block<T>(s.plane, s, i0 + r, j, lanes, masked) + s.q : s.p * sim + s.q;
        match = softplus(l);
        if constexpr (masked) match = drop ? vf{} : match;
        row_pm[r] += hard ? e * match : match;
        if constexpr (hard) col_pm += weight[r] * e * match;
      }
    }
    if constexpr (softmax) masked ? store(out.col_lse + j, col_sum, lanes) : store(out.col_lse + j, col_sum);
    if constexpr (hard) masked ? store(out.col_pm + j, col_pm, lanes) : store(out.col_pm + j, col_pm);
  });

  for (int r = 0; r < R; ++r) {
    const int64_t i = i0 + r;
    const float total = sum(row_sum[r]);
    out.row_lse[i] = total > 0 ? top[r] + std::log(total) : (total == 0 ? -kInf : total);
    out.row_pm[i] = hard ? (total == 0 ? 0.0f : sum(row_pm[r]) / total) : sum(row_pm[r]);
    out.dropped[i] = sum(dropped[r]);
    out.diagonal[i] = to_float(static_cast<const T*>(s.sim)[i * s.columns + s.label + i]);
    out.plane_diagonal[i] =
        s.plane ? to_float(static_cast<const T*>(s.plane)[i * s.columns + s.label + i]) + s.q : s.p * out.diagonal[i] + s.q;
  }
}

// Column sums of one block afresh, each against its own highest value.
template <class T, bool hard>
void resum_block(const Strip& s, int64_t j, int lanes, vf& lse_top, vf& total, vf& pm) {
  lse_top = splat(-kInf);
  total = pm = vf{};
  for (int64_t i = 0; i < s.rows; ++i) {
    const vf z = s.scale * load_block<T>(s.sim, s, i, j, lanes, true);
    lse_top = max(lse_top, dropped_lanes(s, i, j, lanes) ? splat(-kInf) : z);
  }
  lse_top = lse_top == -kInf ? vf{} : lse_top;
  for (int64_t i = 0; i < s.rows; ++i) {
    const vf sim = load_block<T>(s.sim, s, i, j, lanes, true);
    vf e = exp(s.scale * sim - lse_top);
    e = dropped_lanes(s, i, j, lanes) ? vf{} : e;
    total += e;
    if constexpr (hard) {
      const vf l = s.plane ? load_block<T>(s.plane, s, i, j, lanes, true) + s.q : s.p * sim + s.q;
      pm += e * softplus(l);
    }
  }
}

template <class T, Terms terms>
void forward_strip(const Strip& s, const ForwardOut& out) {
  constexpr bool hard = terms == Terms::kSoftmaxHard;
  if constexpr (terms != Terms::kAll) std::memset(out.col_lse, 0, s.columns * sizeof(float));
  if constexpr (hard) std::memset(out.col_pm, 0, s.columns * sizeof(float));
  float reference = -kInf;
  int64_t i = 0;
  for (; i + kTileRows <= s.rows; i += kTileRows) forward_tile<T, terms, kTileRows>(s, out, i, reference);
  for (; i < s.rows; ++i) forward_tile<T, terms, 1>(s, out, i, reference);
  if constexpr (terms == Terms::kAll) return;

  for (int64_t j = 0; j < s.columns; j += W) {
    const int lanes = int(least<int64_t>(W, s.columns - j));
    vf top = splat(reference), total = load(out.col_lse + j, lanes), pm = {};
    if constexpr (hard) pm = load(out.col_pm + j, lanes);
    if (any((total < kLostBelow) & (iota() < lanes))) resum_block<T, hard>(s, j, lanes, top, total, pm);
    for (int l = 0; l < lanes; ++l) {
      out.col_lse[j + l] = total[l] > 0 ? top[l] + std::log(total[l]) : (total[l] == 0 ? -kInf : total[l]);
      if constexpr (hard) out.col_pm[j + l] = total[l] == 0 ? 0.0f : pm[l] / total[l];
    }
  }
}

template <class T, Terms terms, bool one_exp>
BackwardOut backward_strip(const Strip& s, const BackwardIn& in) {
  constexpr bool softmax = terms != Terms::kAll;
  constexpr bool hard = terms == Terms::kSoftmaxHard;
  constexpr bool matching = terms != Terms::kSoftmax;
  BackwardOut total = {0, 0, 0};
  for (int64_t i = 0; i < s.rows; ++i) {
    const T* sim_row = static_cast<const T*>(s.sim) + i * s.columns;
    T* grad_row = static_cast<T*>(s.grad) + i * s.columns;
    T* plane_row = s.plane ? static_cast<T*>(s.plane) + i * s.columns : nullptr;
    const int64_t label = s.label + i;
    const float sim_ii = to_float(sim_row[label]);
    const float plane_ii = plane_row ? to_float(plane_row[label]) : sim_ii;
    const float r = in.row_lse[i], r_negative = in.row_lse_negative[i];
    const float k_row = in.k_row, k_col = in.k_col, k_ratio = one_exp ? k_col * std::exp(r - in.top) : 0.0f;
    vf d_scale = {}, d_p = {}, d_q = {};

    for_blocks(s.columns, label, 1, s.ids != nullptr, [&](int64_t j, int lanes, auto masked) __attribute__((always_inline)) {
      auto column = [&](const float* p) __attribute__((always_inline)) { return masked ? load(p + j, lanes) : load(p + j); };
      const vf sim = masked ? load(sim_row + j, lanes) : load(sim_row + j);
      const vf z = s.scale * sim;
      vf keep = splat(1.0f);
      if constexpr (masked) keep = dropped_lanes(s, i, j, lanes) ? vf{} : keep;
      vf g = {}, h = {};
      if constexpr (softmax) {
        if constexpr (one_exp)
          g = exp(z - r) * (k_ratio * column(in.col_ratio) + k_row);
        else
          g = k_row * exp(z - r) + k_col * exp(z - column(in.col_lse));
        if constexpr (masked) g = keep > 0.0f ? g : vf{};
        d_scale += g * sim;
        g *= s.scale;
      }
      if constexpr (matching) {
        vf v = sim;
        if (plane_row) v = masked ? load(plane_row + j, lanes) : load(plane_row + j);
        h = sigmoid(plane_row ? v + s.q : s.p * v + s.q);
        if constexpr (hard)
          h *= in.k_hard_row * exp(z - r_negative) + in.k_hard_col * exp(z - column(in.col_lse_negative));
        else
          h *= in.k_negative;
        if constexpr (masked) h = keep > 0.0f ? h : vf{};
        d_p += h * v;
        d_q += h;
        if (plane_row)
          masked ? store(plane_row + j, h, lanes) : store(plane_row + j, h);
        else
          g += s.p * h;
      }
      masked ? store(grad_row + j, g, lanes) : store(grad_row + j, g);
    });

    // p - 1 of the positive is -sigmoid(lse of the negatives - z): no cancellation where the pair is well matched.
    const float z_ii = s.scale * sim_ii;
    auto miss = [z_ii](float lse_negative) { return 1.0f / (1.0f + std::exp(z_ii - lse_negative)); };
    float g_ii = 0.0f;
    if constexpr (softmax) {
      g_ii -= in.k_row * miss(r_negative);
      if (in.k_col != 0.0f) g_ii -= in.k_col * miss(in.col_lse_negative[label]);
    }
    float h_ii = 0.0f;
    if constexpr (matching) h_ii = -in.k_positive / (1.0f + std::exp((plane_row ? plane_ii : s.p * plane_ii) + s.q));
    store(grad_row + label, splat(s.scale * g_ii + (plane_row ? 0.0f : s.p * h_ii)), 1);
    if (plane_row) store(plane_row + label, splat(h_ii), 1);
    total.scale += double(sum(d_scale)) + double(g_ii) * sim_ii;
    total.p += double(sum(d_p)) + double(h_ii) * plane_ii;
    total.q += double(sum(d_q)) + h_ii;
  }
  return total;
}

template <class T>
void forward_of(const Strip& s, const ForwardOut& out, Terms terms) {
  switch (terms) {
    case Terms::kSoftmax: return forward_strip<T, Terms::kSoftmax>(s, out);
    case Terms::kSoftmaxAll: return forward_strip<T, Terms::kSoftmaxAll>(s, out);
    case Terms::kSoftmaxHard: return forward_strip<T, Terms::kSoftmaxHard>(s, out);
    case Terms::kAll: return forward_strip<T, Terms::kAll>(s, out);
  }
}

template <class T, bool one_exp>
BackwardOut backward_of(const Strip& s, const BackwardIn& in, Terms terms) {
  switch (terms) {
    case Terms::kSoftmax: return backward_strip<T, Terms::kSoftmax, one_exp>(s, in);
    case Terms::kSoftmaxAll: return backward_strip<T, Terms::kSoftmaxAll, one_exp>(s, in);
    case Terms::kSoftmaxHard: return backward_strip<T, Terms::kSoftmaxHard, one_exp>(s, in);
    default: return backward_strip<T, Terms::kAll, false>(s, in);
  }
}

void merge(const float* lse, const float* mean, int64_t parts, int64_t stride, int64_t columns, float* total_lse,
           float* total_mean) {
  for (int64_t j = 0; j < columns; j += W) {
    const int lanes = int(least<int64_t>(W, columns - j));
    vf before = load(total_lse + j, lanes), top = before;
    for (int64_t k = 0; k < parts; ++k) top = max(top, load(lse + k * stride + j, lanes));
    const vf reference = top == -kInf ? vf{} : top;
    vf total = exp(before - reference), weighted = {};
    if (mean) weighted = total * load(total_mean + j, lanes);
    for (int64_t k = 0; k < parts; ++k) {
      const vf share = exp(load(lse + k * stride + j, lanes) - reference);
      total += share;
      if (mean) weighted += share * load(mean + k * stride + j, lanes);
    }
    for (int l = 0; l < lanes; ++l) {
      total_lse[j + l] = total[l] > 0 ? reference[l] + std::log(total[l]) : (total[l] == 0 ? -kInf : total[l]);
      if (mean) total_mean[j + l] = total[l] == 0 ? 0.0f : weighted[l] / total[l];
    }
  }
}

void add(float* sum, const bf16* part, int64_t count) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(sum + i, load(sum + i) + load(part + i));
  for (; i < count; ++i) sum[i] += to_float(part[i]);
}

void round(bf16* to, const float* from, int64_t count) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(to + i, load(from + i));
  for (; i < count; ++i) assign(to[i], from[i]);
}

void forward(const Strip& s, const ForwardOut& out, Terms terms, bool is_bf16) {
  is_bf16 ? forward_of<bf16>(s, out, terms) : forward_of<float>(s, out, terms);
}

BackwardOut backward(const Strip& s, const BackwardIn& in, Terms terms, bool is_bf16) {
  if (in.col_ratio) return is_bf16 ? backward_of<bf16, true>(s, in, terms) : backward_of<float, true>(s, in, terms);
  return is_bf16 ? backward_of<bf16, false>(s, in, terms) : backward_of<float, false>(s, in, terms);
}
