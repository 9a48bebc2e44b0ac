// Included after strip_impl.h, inside the namespace of an instruction set: sigmoid terms of a strip, values and gradient at once.

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

// Adds the sums of K terms over row i's negatives to `sums`. `gradient`: writes the gradient with respect to S to grad_row, 0 at
// the columns that are no negatives.
template <class T, int K, bool gradient>
void sigmoid_row(const Strip& s, const SigmoidTerm* terms, int64_t i, T* grad_row, SigmoidSums& sums) {
  constexpr bool coarse = std::is_same_v<T, bf16>;
  SoftplusSum negative[K];
  vf d_weight[K] = {}, d_bias[K] = {};
  vf log2_weight[K], log2_bias[K], slope[K];
  int factors = 0;
  for (int k = 0; k < K; ++k) {
    log2_weight[k] = splat(kLog2E * terms[k].weight);
    log2_bias[k] = splat(kLog2E * terms[k].bias);
    slope[k] = splat(terms[k].weight * terms[k].negative);
  }

  for_blocks(s, i, 1, [&](int64_t j, auto lanes, auto masked) __attribute__((always_inline)) {
    const vf sim = load_block<T>(s.sim, s, i, j, lanes);
    const vi drop = masked ? dropped_lanes(s, i, j, lanes) : vi{};
    vf g = {};
#pragma GCC unroll 2
    for (int k = 0; k < K; ++k) {
      const vf t = log2_weight[k] * sim + log2_bias[k];  // l / log(2)
      const vf e = exp2<coarse>((vf)((vi)t | INT32_MIN));  // e^-|l|
      const vf top = max(t, vf{});
      negative[k].add(drop ? vf{} : e, drop ? vf{} : top);
      if constexpr (gradient) {
        const vf inverse = inverse_of<coarse>(e + 1.0f);
        vf h = t < 0.0f ? e * inverse : inverse;  // sigmoid(l)
        h = drop ? vf{} : h;
        d_weight[k] += h * sim;
        d_bias[k] += h;
        g += slope[k] * h;
      }
    }
    if (++factors == SoftplusSum::kFactors) {
      for (int k = 0; k < K; ++k) negative[k].flush();
      factors = 0;
    }
    if constexpr (gradient) store(grad_row + j, g, lanes);
  });

  for (int k = 0; k < K; ++k) {
    negative[k].flush();
    sums.negative[k] += double(sum(negative[k].total));
    sums.weight[k] += double(terms[k].negative) * sum(d_weight[k]);
    sums.bias[k] += double(terms[k].negative) * sum(d_bias[k]);
  }
}

// Adds the sums of K terms over a row's positive, whose similarity is `sim`. Returns the gradient with respect to it.
template <int K, bool gradient>
float add_positive(const SigmoidTerm* terms, float sim, SigmoidSums& sums) {
  float g = 0;
  for (int k = 0; k < K; ++k) {
    const float l = terms[k].weight * sim + terms[k].bias, e = std::exp(-std::fabs(l));
    sums.positive[k] += std::max(l, 0.0f) - l + std::log1p(e);
    if constexpr (!gradient) continue;
    const float slope = -terms[k].positive * (l < 0 ? 1 : e) / (1 + e);  // -sigmoid(-l)
    sums.weight[k] += double(slope) * sim;
    sums.bias[k] += slope;
    g += terms[k].weight * slope;
  }
  return g;
}

template <class T, int K, bool gradient>
SigmoidSums sigmoid_strip(const Strip& s, const SigmoidTerm* terms) {
  SigmoidSums sums{};
  for (int64_t i = 0; i < s.rows; ++i) {
    const int64_t label = s.label + i;
    T* const grad_row = gradient ? static_cast<T*>(s.grad) + i * s.columns : nullptr;
    const float g = add_positive<K, gradient>(terms, to_float(static_cast<const T*>(s.sim)[i * s.columns + label]), sums);
    sigmoid_row<T, K, gradient>(s, terms, i, grad_row, sums);
    if constexpr (gradient) store(grad_row + label, splat(g), 1);
  }
  return sums;
}

SigmoidSums sigmoids(const Strip& s, const SigmoidTerm* terms, int count, bool is_bf16) {
  return by_value<false, true>(is_bf16, [&](auto is_bf16) {
    return by_value<1, 2>(count, [&](auto count) {
      return by_value<false, true>(s.grad != nullptr, [&](auto gradient) {
        return sigmoid_strip<std::conditional_t<is_bf16(), bf16, float>, count(), gradient()>(s, terms);
      });
    });
  });
}
