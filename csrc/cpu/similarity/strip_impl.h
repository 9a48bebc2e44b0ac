// Included after vec.h, inside the namespace of an instruction set. See strip.h.

constexpr float kInf = std::numeric_limits<float>::infinity();
// A column sum below this may have lost terms that underflowed relative to the strip's reference; it is summed again.
constexpr float kLostBelow = 1e-28f;

// Calls f(j, lanes, masked) for every block of W columns of the strip's rows [i, i + rows), as each_block does; masked is true if
// a lane may not be a negative. With ids this is every block, else those with the rows' own pairs.
template <class F>
VINLINE void for_blocks(const Strip& s, int64_t i, int64_t rows, F&& f) {
  const int64_t full = s.columns / W * W, first_label = s.label + i;
  const int64_t lo = s.ids ? 0 : least(first_label / W * W, full);
  const int64_t hi = s.ids ? full : least((first_label + rows + W - 1) / W * W, full);
  constexpr std::integral_constant<int, W> all;
  int64_t j = 0;
  for (; j < lo; j += W) f(j, all, std::false_type{});
  for (; j < hi; j += W) f(j, all, std::true_type{});
  for (; j < full; j += W) f(j, all, std::false_type{});
  if (full < s.columns) f(full, int(s.columns - full), std::true_type{});
}

// Lanes of the block at column j that are not negatives of row i: those that belong to it, and those past the end.
VINLINE vi dropped_lanes(const Strip& s, int64_t i, int64_t j, int lanes) {
  const vi lane = iota();
  vi dropped = (lane + int32_t(j)) == int32_t(s.label + i);
  if (s.ids) dropped |= load(s.text_ids + j, lanes) == s.ids[i];
  return lanes < W ? dropped | (lane >= lanes) : dropped;
}

template <class T, class Lanes>
VINLINE vf load_block(const void* base, const Strip& s, int64_t i, int64_t j, Lanes lanes) {
  return load(static_cast<const T*>(base) + i * s.columns + j, lanes);
}

constexpr float kLn2 = 0.69314718f, kLog2E = 1.44269504f;

// 2^t: relative error below 8e-8, or coarse 8e-5, for logits that are rounded to bf16 anyway.
template <bool coarse>
VINLINE vf exp2(vf t) {
#if SIMPLCLIP_LANES == 16
  const vf r = (vf)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  t = t < -126.0f ? splat(-126.0f) : (t > 126.0f ? splat(126.0f) : t);
  const vf shifted = t + 12582912.0f;
  const vf r = t - (shifted - 12582912.0f);
#endif
  vf p;
  if constexpr (coarse) {
    p = splat(5.517166954e-2f);
    p = p * r + 2.426111254e-1f;
    p = p * r + 6.932609857e-1f;
    p = p * r + 9.999280733e-1f;
  } else {
    p = splat(1.327647205e-3f);
    p = p * r + 9.675541385e-3f;
    p = p * r + 5.550713274e-2f;
    p = p * r + 2.402211972e-1f;
    p = p * r + 6.931469671e-1f;
    p = p * r + 1.000000072f;
  }
#if SIMPLCLIP_LANES == 16
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)(t - r));
#else
  return (vf)((vi)p + ((vi)shifted << 23));
#endif
}

// e^x of a logit x. Rounding to bf16 changes a logit by more than the error of the coarse form. `exact`: terms cancel, so that
// the error counts: in blocks that may hold pairs, whose gradient is the small 1 - probability, and in distillation.
template <class T, bool exact>
VINLINE vf exp_of_logit(vf x) {
  if constexpr (std::is_same_v<T, bf16> && !exact) return exp2<true>(x * kLog2E);
  else return exp(x);
}

// The log of a sum relative to a reference; -inf if the sum is empty, NaN if it is NaN.
VINLINE vf lse_of(vf total, vf reference) {
  return total > 0.0f ? reference + log(total) : (total == 0.0f ? splat(-kInf) : total);
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
    store(total_lse + j, lse_of(total, reference), lanes);
    if (mean) store(total_mean + j, total == 0.0f ? vf{} : weighted / total, lanes);
  }
}
