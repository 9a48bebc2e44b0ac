// Included after strip_impl.h, inside the namespace of an instruction set: sigmoid terms of a row, values and gradient at once.

// Returns 1 / x for x >= 1, with the precision of exp2<coarse>.
template <bool coarse>
VINLINE vf inverse_of(vf x) {
#if SIMPLCLIP_LANES == 16
  const vf y = (vf)_mm512_rcp14_ps((__m512)x);  // relative error below 2^-14
  return coarse ? y : y * (2.0f - x * y);
#else
  return 1.0f / x;
#endif
}

// Sums softplus(x) = max(x, 0) + log(1 + e), e = e^-|x|, with one logarithm for up to kFactors of the x: that of the product of
// their (1 + e). `product` is this product minus 1, so that a small e loses nothing.
struct SoftplusSum {
  static constexpr int kFactors = 120;  // each factor is at most 2, so that the product does not overflow
  vf product = {}, tops = {}, total = {};  // tops: sum of max(x, 0) / log(2)

  VINLINE void add(vf e, vf top) {
    product += e * (product + 1.0f);
    tops += top;
  }
  VINLINE void flush() {
    total += kLn2 * tops + (product > 1.0f ? log(product + 1.0f) : log1p(product > 1.0f ? vf{} : product));
    product = tops = vf{};
  }
};

// What sigmoid_row computes: the sums of the terms, their gradient, or both.
enum class Sigmoid { kValues, kGradient, kBoth };

template <class T, int K, Sigmoid what, class Grad>
void sigmoid_row(const Strip& s, const SigmoidIn& in, int64_t i, Grad* grad_row, SigmoidOut& out) {
  constexpr bool coarse = std::is_same_v<T, bf16>, values = what != Sigmoid::kGradient, gradient = what != Sigmoid::kValues;
  const T* sim_row = static_cast<const T*>(s.sim) + i * s.columns;
  SoftplusSum negative[K];
  vf positive[K] = {}, d_weight[K] = {}, d_bias[K] = {}, weight_of_positives[K] = {}, bias_of_positives[K] = {};
  int factors = 0;
  SigmoidTerm terms[K];  // a copy, so that the compiler knows that no store to grad_row changes it
  vf log2_weight[K], log2_bias[K], slope[K];
  for (int k = 0; k < K; ++k) {
    terms[k] = in.terms[k];
    log2_weight[k] = splat(kLog2E * terms[k].weight);
    log2_bias[k] = splat(kLog2E * terms[k].bias);
    slope[k] = splat(terms[k].weight * terms[k].negative);
  }

  const int64_t label = in.pairs.label + i;
  for_blocks(s.columns, label, 1, everywhere(in.pairs), [&](int64_t j, auto lanes, auto masked) __attribute__((always_inline)) {
    const vf sim = load(sim_row + j, lanes);
    vi dropped = {}, matched = {};
    vf share = {};
    if constexpr (masked) {
      const PairLanes pairs(in.pairs, i, j, int(lanes));
      matched = (in.row_share ? pairs.belongs : pairs.own) & ~pairs.outside;
      dropped = pairs.no_negatives() & ~matched;
      share = in.row_share ? in.row_share[i] + load(in.column_share + j, lanes) : splat(1.0f);
    }
    vf g = {};
#pragma GCC unroll 2
    for (int k = 0; k < K; ++k) {
      vf t = log2_weight[k] * sim + log2_bias[k];  // l / log(2)
      if constexpr (!values) t = max(splat(-126.0f), t);  // so that e^-l is finite; in this order a NaN stays one
      const vf e = exp2<coarse>(values ? (vf)((vi)t | INT32_MIN) : -t);  // e^-|l|, or e^-l where only the gradient is computed
      const vf top = max(t, vf{});
      if constexpr (values && masked) {
        const vi other = dropped | matched;
        negative[k].add(other ? vf{} : e, other ? vf{} : top);
        if (any(matched)) positive[k] += matched ? share * (kLn2 * (top - t) + log1p(e)) : vf{};
      } else if constexpr (values) {
        negative[k].add(e, top);
      }
      if constexpr (gradient) {
        const vf inverse = inverse_of<coarse>(e + 1.0f);
        vf h = values ? (t < 0.0f ? e * inverse : inverse) : inverse;  // sigmoid(l)
        if constexpr (masked) {
          const vf bounded = e < 1e30f ? e : splat(1e30f);
          vf miss = bounded * inverse_of<coarse>(bounded + 1.0f);  // sigmoid(-l)
          if constexpr (values) miss = (t < 0.0f ? splat(1.0f) : e) * inverse;
          h = dropped | matched ? vf{} : h;
          const vf of_positive = matched ? -terms[k].positive * share * miss : vf{};
          weight_of_positives[k] += matched ? of_positive * sim : vf{};
          bias_of_positives[k] += of_positive;
          g += terms[k].weight * of_positive;
        }
        d_weight[k] += masked ? (dropped | matched ? vf{} : h * sim) : h * sim;
        d_bias[k] += h;
        g += slope[k] * h;
      }
    }
    if constexpr (values)
      if (++factors == SoftplusSum::kFactors) {
        for (int k = 0; k < K; ++k) negative[k].flush();
        factors = 0;
      }
    if constexpr (gradient) store(grad_row + j, g, lanes);
  });
  for (int k = 0; k < K; ++k) {
    negative[k].flush();
    out.negative[k] += double(sum(negative[k].total));
    out.positive[k] += double(sum(positive[k]));
    out.weight[k] += double(terms[k].negative) * sum(d_weight[k]) + sum(weight_of_positives[k]);
    out.bias[k] += double(terms[k].negative) * sum(d_bias[k]) + sum(bias_of_positives[k]);
  }
}

// Adds row i's sums to `out`, and writes the gradient with respect to S to grad_row.
template <class T, Sigmoid what, class Grad>
void sigmoid_row(const Strip& s, const SigmoidIn& in, int64_t i, Grad* grad_row, SigmoidOut& out) {
  by_value<1, 2>(in.count, [&](auto count) { sigmoid_row<T, count(), what>(s, in, i, grad_row, out); });
}

SigmoidOut sigmoid_strip(const Strip& s, const SigmoidIn& in, bool is_bf16) {
  SigmoidOut out{};
  by_value<false, true>(is_bf16, [&](auto is_bf16) {
    using T = std::conditional_t<is_bf16(), bf16, float>;
    T* const grad = static_cast<T*>(s.grad);
    by_value<Sigmoid::kValues, Sigmoid::kBoth>(grad ? Sigmoid::kBoth : Sigmoid::kValues, [&](auto what) {
      for (int64_t i = 0; i < s.rows; ++i) sigmoid_row<T, what()>(s, in, i, grad + (grad ? i * s.columns : 0), out);
    });
  });
  return out;
}
