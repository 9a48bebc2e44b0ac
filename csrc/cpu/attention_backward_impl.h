// Backward of shaped attention, one head. Included after attention_forward_impl.h.
//
// For some rows: logits again, dP = do v^T, from both dS and the mixing weights, and dq at once; dk and dv from a block of
// rows when it is full. Everything of the gains lies in dP: its trace, its mean under the softmax and its plain mean.

// In a row i: logits become scale dS, dp becomes the mixing weights; both are 0 behind the `count` visible keys.
inline void row_gradients(float* logits, float* dp, int64_t columns, int64_t count, float scale, float beta, float gamma, float lse,
                          double* gains) {
  const vi lanes = iota();
  vf mean = {}, plain = {};
  for (int64_t c = 0; c < columns; c += W) {
    const vf probability = exp(load(logits + c) * scale - lse);
    const vf p = c + W <= count ? probability : (lanes < int32_t(count - c) ? probability : vf{});
    const vf d = c + W <= count ? load(dp + c) : (lanes < int32_t(count - c) ? load(dp + c) : vf{});
    store(logits + c, p);
    mean += p * d;
    plain += d;
  }
  const float delta = sum(mean), uniform = gamma / float(count), factor = scale * beta;
  gains[1] += delta;
  gains[2] -= sum(plain) / float(count);
  for (int64_t c = 0; c < columns; c += W) {
    const vf p = load(logits + c), d = load(dp + c);
    store(logits + c, p * (d - delta) * factor);
    const vf mixing = p * beta - uniform;
    store(dp + c, c + W <= count ? mixing : (lanes < int32_t(count - c) ? mixing : vf{}));
  }
}

template <class T>
void attention_backward_typed(const AttentionHead& head, const AttentionGrad& grad, double* gains, float* scratch) {
  const int64_t n = head.valid, width = head.width;
  const int64_t tokens = round_up(n, kTile), columns = round_up(n, W), padded = round_up(width, W);
  float* next = scratch;
  auto take = [&](int64_t floats) { return next += floats, next - floats; };
  float* const q = take(tokens * padded);
  float* const k = take(tokens * padded);
  float* const d_out = take(tokens * padded);
  float* const dk = take(tokens * padded);
  float* const dv = take(tokens * padded);
  float* const kt = take(columns * padded);
  float* const vt = take(columns * padded);
  float* const ds = take(std::min(kBlockRows, tokens) * columns);
  float* const mixing = take(std::min(kBlockRows, tokens) * columns);
  pack<T>(head.v, n, width, q, padded, tokens);
  transpose_rows(q, padded, n, padded, vt, columns);
  pack<T>(head.k, n, width, k, padded, tokens);
  transpose_rows(k, padded, n, padded, kt, columns);
  pack<T>(head.q, n, width, q, padded, tokens);
  pack<T>(grad.grad, n, width, d_out, padded, tokens);
  gains[0] = gains[1] = gains[2] = 0;
  std::memset(dk, 0, tokens * padded * sizeof(float));
  for (int64_t c = 0; c < tokens * padded; c += W) store(dv + c, load(d_out + c) * head.alpha);
  const auto zero = [](int, int64_t) { return vf{}; };

  for (int64_t block = 0; block < n; block += kBlockRows) {
    const int64_t end = std::min(block + kBlockRows, n);
    for (int64_t i = block; i < end; i += kTile) {
      const int64_t seen = head.causal ? std::min(i + kTile, n) : n, count = std::min<int64_t>(kTile, n - i);
      const int64_t seen_columns = round_up(seen, W);
      float* const s = ds + (i - block) * columns;
      float* const dp = mixing + (i - block) * columns;
      row_product(seen_columns / W, width, q + i * padded, padded, 1, kt, columns, zero,
                  [&](int r, int64_t c, vf x) { store(s + r * columns + c, x); });
      row_product(seen_columns / W, width, d_out + i * padded, padded, 1, vt, columns, zero,
                  [&](int r, int64_t c, vf x) { store(dp + r * columns + c, x); });
      for (int64_t r = 0; r < count; ++r) {
        gains[0] += dp[r * columns + i + r];
        row_gradients(s + r * columns, dp + r * columns, seen_columns, head.causal ? i + r + 1 : n, head.scale, head.beta,
                      head.gamma, head.lse[i + r], gains);
      }
      row_product(padded / W, seen, s, columns, 1, k, padded, zero, [&](int r, int64_t c, vf x) {
        if (r >= count) return;
        T* to = static_cast<T*>(grad.dq.data) + (i + r) * grad.dq.stride + c;
        if (c + W <= width) store(to, x);
        else store(to, x, int(width - c));
      });
    }
    // Row i sees key j only from i = j on where causal; tiles of rows and of keys begin at the same tokens.
    for (int64_t j = 0; j < (head.causal ? end : n); j += kTile) {
      const int64_t first = head.causal ? std::max(block, j) : block, at = (first - block) * columns + j;
      const auto accumulate = [&](float* sums, const float* left, const float* right) {
        row_product(padded / W, end - first, left + at, 1, columns, right + first * padded, padded,
                    [&](int r, int64_t c) { return load(sums + (j + r) * padded + c); },
                    [&](int r, int64_t c, vf x) { store(sums + (j + r) * padded + c, x); });
      };
      accumulate(dk, ds, q);
      accumulate(dv, mixing, d_out);
    }
  }
  unpack<T>(dk, padded, n, head.length, width, grad.dk);
  unpack<T>(dv, padded, n, head.length, width, grad.dv);
  for (int64_t i = n; i < head.length; ++i) std::memset(static_cast<T*>(grad.dq.data) + i * grad.dq.stride, 0, width * sizeof(T));
}

void attention_backward(const AttentionHead& head, const AttentionGrad& grad, double* gains, float* scratch) {
  by_type(head.type, [&]<class T>(T*) { attention_backward_typed<T>(head, grad, gains, scratch); });
}
