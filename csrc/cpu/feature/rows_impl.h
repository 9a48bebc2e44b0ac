// Included after vec.h, inside the namespace of an instruction set. See rows.h.
// A row is read twice, for the norms (or u.g) and for the distance (or the gradient); the second time it is in the cache.

constexpr float kEps = 1e-12f;  // as in F.normalize

// Returns 1 / max(norm, kEps), and NaN for a NaN norm.
VINLINE float inverse(float squares) {
  const float norm = std::sqrt(squares);
  return 1.0f / (norm < kEps ? kEps : norm);
}

template <class S, class T, bool smooth>
double feature_forward_of(const FeatureRows& in) {
  double total = 0;
  for (int64_t i = 0; i < in.rows; ++i) {
    const S* x = static_cast<const S*>(in.student) + i * in.columns;
    const T* y = static_cast<const T*>(in.teacher) + i * in.columns;
    float x_inv = 1.0f, y_inv = 1.0f;
    if (in.student_inv) {
      vf xx = {}, yy = {};
      each_block(in.columns, [&](int64_t j, auto lanes) __attribute__((always_inline)) {
        const vf a = load(x + j, lanes), b = load(y + j, lanes);
        xx += a * a;
        yy += b * b;
      });
      in.student_inv[i] = x_inv = inverse(sum(xx));
      in.teacher_inv[i] = y_inv = inverse(sum(yy));
    }
    vf distance = {};
    each_block(in.columns, [&](int64_t j, auto lanes) __attribute__((always_inline)) {
      const vf d = load(x + j, lanes) * x_inv - load(y + j, lanes) * y_inv;
      if constexpr (smooth)
        distance += abs(d) < in.beta ? 0.5f * d * d / in.beta : abs(d) - 0.5f * in.beta;
      else
        distance += d * d;
    });
    total += double(sum(distance));
  }
  return total;
}

template <class S, class T, bool smooth>
void feature_backward_of(const FeatureRows& in, float factor, void* grad) {
  for (int64_t i = 0; i < in.rows; ++i) {
    const S* x = static_cast<const S*>(in.student) + i * in.columns;
    const T* y = static_cast<const T*>(in.teacher) + i * in.columns;
    S* to = static_cast<S*>(grad) + i * in.columns;
    const float x_inv = in.student_inv ? in.student_inv[i] : 1.0f, y_inv = in.student_inv ? in.teacher_inv[i] : 1.0f;
    auto slope = [&](vf u, int64_t j, auto lanes) __attribute__((always_inline)) {
      const vf d = u - load(y + j, lanes) * y_inv;
      if constexpr (smooth)
        return d > in.beta ? splat(1.0f) : (d < -in.beta ? splat(-1.0f) : d / in.beta);
      else
        return d;
    };
    float along = 0.0f;  // u.g, which normalisation removes; 0 if the row is shorter than eps and thus divided by a constant
    if (in.student_inv && !(x_inv >= 1.0f / kEps)) {
      vf dot = {};
      each_block(in.columns, [&](int64_t j, auto lanes) __attribute__((always_inline)) {
        const vf u = load(x + j, lanes) * x_inv;
        dot += u * slope(u, j, lanes);
      });
      along = sum(dot);
    }
    const float k = factor * x_inv;
    each_block(in.columns, [&](int64_t j, auto lanes) __attribute__((always_inline)) {
      const vf u = load(x + j, lanes) * x_inv;
      const vf g = slope(u, j, lanes);
      store(to + j, k * (along == 0.0f ? g : g - u * along), lanes);  // keeps the gradient of an infinite u where along is 0
    });
  }
}

double feature_forward(const FeatureRows& in) {
  return by_type(in.student_type, [&]<class S>(S*) {
    return by_type(in.teacher_type, [&]<class T>(T*) {
      return in.smooth ? feature_forward_of<S, T, true>(in) : feature_forward_of<S, T, false>(in);
    });
  });
}

void feature_backward(const FeatureRows& in, float factor, void* grad) {
  by_type(in.student_type, [&]<class S>(S*) {
    by_type(in.teacher_type, [&]<class T>(T*) {
      in.smooth ? feature_backward_of<S, T, true>(in, factor, grad) : feature_backward_of<S, T, false>(in, factor, grad);
    });
  });
}
