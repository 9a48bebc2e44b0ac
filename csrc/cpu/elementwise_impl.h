// Loops over floats: activations and their derivatives, sums. Included after vec.h, inside the namespace of an instruction set.

// Cumulative distribution (absolute error below 1e-7) and density of the normal distribution at x, Abramowitz and Stegun 7.1.26:
// erfc(|x| / sqrt 2) = e^(-x^2/2) P(t).
struct Normal {
  vf integral, density;
};

VINLINE Normal normal(vf x) {
  const vf t = 1.0f / (abs(x) * (0.3275911f * 0.70710678f) + 1.0f);
  vf p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const vf e = exp(x * x * -0.5f), tail = p * t * e * 0.5f;
  return {x < 0.0f ? tail : 1.0f - tail, e * 0.39894228f};
}

// inner is w and inner_slope is its derivative, for the activations of the form x sigmoid(w(x)).
template <Activation A>
VINLINE vf inner(vf x) {
  // 2 sqrt(2 / pi) (x + 0.044715 x^3)
  if constexpr (A == Activation::kGeluTanh) return x * (x * x * 0.0713548163f + 1.5957691216f);
  if constexpr (A == Activation::kQuickGelu) return x * 1.702f;
  return x;
}

template <Activation A>
VINLINE vf inner_slope(vf x) {
  if constexpr (A == Activation::kGeluTanh) return x * x * 0.2140644488f + 1.5957691216f;
  if constexpr (A == Activation::kQuickGelu) return splat(1.702f);
  return splat(1.0f);
}

template <Activation A>
VINLINE vf activate(vf x) {
  if constexpr (A == Activation::kRelu) return x < 0.0f ? vf{} : x;
  else if constexpr (A == Activation::kGelu) return x * normal(x).integral;
  else return x * sigmoid(inner<A>(x));
}

template <Activation A>
VINLINE vf slope(vf x) {
  if constexpr (A == Activation::kRelu) return x <= 0.0f ? vf{} : splat(1.0f);  // 1 for NaN, as in torch
  else if constexpr (A == Activation::kGelu) {
    const Normal n = normal(x);
    return n.integral + x * n.density;
  } else {
    const vf s = sigmoid(inner<A>(x));
    return s + x * s * (1.0f - s) * inner_slope<A>(x);
  }
}

void elementwise_activate(Activation act, Float type, const void* h, const void* grad, void* to, int64_t count) {
  by_type(type, [&]<class T>(T*) {
    using enum Activation;
    by_value<kGelu, kGeluTanh, kQuickGelu, kRelu, kSilu>(act, [&](auto a) {
      each_block(count, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
        const vf x = load(static_cast<const T*>(h) + i, lanes);
        const vf y = grad ? load(static_cast<const T*>(grad) + i, lanes) * slope<a()>(x) : activate<a()>(x);
        store(static_cast<T*>(to) + i, y, lanes);
      });
    });
  });
}

void elementwise_convert(Float from_type, const void* from, Float to_type, void* to, int64_t count, bool add) {
  by_type(from_type, [&]<class S>(S*) {
    by_type(to_type, [&]<class T>(T*) {
      each_block(count, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
        const vf x = load(static_cast<const S*>(from) + i, lanes);
        T* p = static_cast<T*>(to) + i;
        store(p, add ? load(p, lanes) + x : x, lanes);
      });
    });
  });
}
