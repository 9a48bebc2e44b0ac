// Included after strip_impl.h, inside the namespace of an instruction set: sigmoid terms of a strip, values and gradient at once.

// Sums of softplus(x) = max(x, 0) + log(1 + e^-|x|) of many x with one logarithm for many: over products of (1 + e), kept as
// their difference from 1, so that a small e loses nothing.
struct SoftplusSum {
  static constexpr int kFactors = 120;  // each at most 2, so that their product is a float
  vf product = {}, total = {};
  int factors = 0;

  VINLINE void add(vf e, vf positive_part) {
    product += e * (product + 1.0f);
    total += positive_part;
    if (++factors == kFactors) flush();
  }
  VINLINE void flush() {
    total += product > 1.0f ? log(product + 1.0f) : log1p(product > 1.0f ? vf{} : product);
    product = vf{};
    factors = 0;
  }
};

template <class T, int K, bool gradient>
void sigmoid_row(const Strip& s, const SigmoidIn& in, int64_t i, SigmoidOut& out) {
  const T* sim_row = static_cast<const T*>(s.sim) + i * s.columns;
  T* grad_row = gradient ? static_cast<T*>(s.grad) + i * s.columns : nullptr;
  SoftplusSum negative[K];
  vf positive[K] = {}, d_weight[K] = {}, d_bias[K] = {};

  for_blocks(s.columns, s.label + i, 1, s.ids != nullptr, [&](int64_t j, auto lanes, auto masked) __attribute__((always_inline)) {
    const vf sim = load(sim_row + j, lanes);
    vi dropped = {}, matched = {};
    vf share = {};
    if constexpr (masked) {
      const vi lane = iota();
      matched = (lane + int32_t(j)) == int32_t(s.label + i);
      dropped = lane >= int(lanes);
      if (s.ids) (in.row_share ? matched : dropped) |= (load(s.text_ids + j, int(lanes)) == s.ids[i]) & ~matched;
      matched &= ~dropped;
      share = in.row_share ? in.row_share[i] + load(in.column_share + j, lanes) : splat(1.0f);
    }
    vf g = {};
#pragma GCC unroll 2
    for (int k = 0; k < K; ++k) {
      const SigmoidTerm& term = in.terms[k];
      const vf l = term.weight * sim + term.bias;
      const vf e = exp(-abs(l)), top = max(l, vf{});
      const vi other = dropped | matched;
      negative[k].add(other ? vf{} : e, other ? vf{} : top);
      if constexpr (masked)
        if (any(matched)) positive[k] += matched ? share * (top - l + log1p(e)) : vf{};
      if constexpr (gradient) {
        // sigmoid(l) of a negative, sigmoid(-l) of a positive
        vf h = term.negative * ((l < 0.0f ? e : splat(1.0f)) / (e + 1.0f));
        if constexpr (masked) {
          const vf of_positive = -term.positive * share * ((l < 0.0f ? splat(1.0f) : e) / (e + 1.0f));
          h = dropped ? vf{} : (matched ? of_positive : h);
        }
        d_weight[k] += dropped ? vf{} : h * sim;
        d_bias[k] += h;
        g += term.weight * h;
      }
    }
    if constexpr (gradient) store(grad_row + j, g, lanes);
  });
  for (int k = 0; k < K; ++k) {
    negative[k].flush();
    out.negative[k] += double(sum(negative[k].total));
    out.positive[k] += double(sum(positive[k]));
    out.weight[k] += double(sum(d_weight[k]));
    out.bias[k] += double(sum(d_bias[k]));
  }
}

SigmoidOut sigmoid_strip(const Strip& s, const SigmoidIn& in, bool is_bf16) {
  SigmoidOut out{};
  by_value<false, true>(is_bf16, [&](auto is_bf16) {
    by_value<false, true>(s.grad != nullptr, [&](auto gradient) {
      by_value<1, 2>(in.count, [&](auto count) {
        using T = std::conditional_t<is_bf16(), bf16, float>;
        for (int64_t i = 0; i < s.rows; ++i) sigmoid_row<T, count(), gradient()>(s, in, i, out);
      });
    });
  });
  return out;
}
