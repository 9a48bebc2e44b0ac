// Backward of shaped attention, one head. Included after forward_impl.h.
//
// For kTile rows at a time it computes the logits again, dP = dO V^T, from both dS and the mixing weights, then dq. After each
// block of kBlockRows rows it adds the block's share of dk and dv. The gradients of alpha, beta and gamma are sums over the rows:
// of the diagonal of dP, of the mean of dP under the softmax, and of minus the plain mean of dP.

// Replaces a row's logits by scale dS and its dp by mixing weights, both 0 after the `count` visible keys; adds to `gains`.
inline void row_gradients(const AttentionHead& head, float lse, float* logits, float* dp, int64_t columns, int64_t count,
                          double* gains) {
  const vi lanes = iota();
  const float scale = head.scale, beta = head.beta, factor = scale * beta;
  const int64_t visible = round_up(count, W);
  vf mean = {}, plain = {};
  for (int64_t c = 0; c < visible; c += W) {
    const vf probability = exp(scaled(scale, load(logits + c)) - lse);
    const vf p = c + W <= count ? probability : (lanes < int32_t(count - c) ? probability : vf{});
    const vf d = c + W <= count ? load(dp + c) : (lanes < int32_t(count - c) ? load(dp + c) : vf{});
    store(logits + c, p);
    mean += p * d;
    plain += d;
  }
  const float delta = sum(mean), uniform = head.gamma / float(count);
  gains[1] += delta;
  gains[2] -= sum(plain) / float(count);
  for (int64_t c = 0; c < visible; c += W) {
    const vf p = load(logits + c), d = load(dp + c);
    store(logits + c, p * (d - delta) * factor);
    const vf mixing = p * beta - uniform;
    store(dp + c, c + W <= count ? mixing : (lanes < int32_t(count - c) ? mixing : vf{}));
  }
  for (int64_t c = visible; c < columns; c += W) store(logits + c, vf{}), store(dp + c, vf{});
}

template <class T>
void attention_backward_typed(const AttentionHead& head, const AttentionGrad& grad, double* gains, float* scratch) {
  using U = typename Unit<T>::type;
  constexpr int kFloats = Unit<T>::kFloats;
  const int64_t n = head.valid, width = head.width, tokens = round_up(n, kTile), columns = round_up(n, kStep);
  const int64_t padded = round_up(width, W * kFloats), units = padded / kFloats;  // a row in floats, in units
  const int64_t matrix_rows = std::min(kBlockRows, tokens);
  Scratch next{scratch};
  U* const q = next.take<U>(tokens * units);
  U* const d_out = next.take<U>(tokens * units);
  U* const kt = next.take<U>(units * columns);
  U* const vt = next.take<U>(units * columns);
  U* const k = next.take<U>(tokens * units);  // in rows form until transposed, then stacked
  float* const dk = next.take<float>(tokens * padded);
  float* const dv = next.take<float>(tokens * padded);
  U* const ds = next.take<U>(matrix_rows * columns / kFloats);
  U* const mixing = next.take<U>(matrix_rows * columns / kFloats);
  pack_rows<T>(head.v, n, width, k, units, tokens);
  transpose_rows(k, units, n, units, vt, columns);
  pack_rows<T>(head.k, n, width, k, units, tokens);
  transpose_rows(k, units, n, units, kt, columns);
  pack_rows<T>(head.q, n, width, q, units, tokens);
  pack_rows<T>(grad.grad, n, width, d_out, units, tokens);
  U *q_stacked = q, *d_out_stacked = d_out, *left = nullptr;
  float *s_tile = nullptr, *dp_tile = nullptr;
  if constexpr (kFloats == 2) {
    q_stacked = next.take<U>(tokens * units);
    d_out_stacked = next.take<U>(tokens * units);
    stack_rows<T>(head.k, n, width, k, padded, tokens);
    stack_rows<T>(head.q, n, width, q_stacked, padded, tokens);
    stack_rows<T>(grad.grad, n, width, d_out_stacked, padded, tokens);
    s_tile = next.take<float>(kTile * columns);
    dp_tile = next.take<float>(kTile * columns);
    left = next.take<U>(kTile * columns / kFloats);
  }
  gains[0] = gains[1] = gains[2] = 0;
  std::memset(dk, 0, tokens * padded * sizeof(float));
  for (int64_t i = 0; i < tokens; ++i)
    for (int64_t c = 0; c < width; c += W)
      store(dv + i * padded + c, load_up_to(row_of<T>(grad.grad, i, n) + c, width - c) * head.alpha);

  for (int64_t block = 0; block < n; block += kBlockRows) {
    const int64_t end = std::min(block + kBlockRows, n);
    for (int64_t i = block; i < end; i += kTile) {
      const int64_t seen = head.causal ? std::min(i + kTile, n) : n, count = std::min<int64_t>(kTile, n - i);
      const int64_t seen_columns = round_up(seen, kStep), at = (i - block) / kFloats * columns;
      float *s = s_tile, *dp = dp_tile;
      if constexpr (kFloats == 1) s = ds + at, dp = mixing + at;
      row_product(seen_columns / W, units_of(width, kFloats), Units<U>{q + i * units, units}, Units<U>{kt, columns}, Zero{},
                  StoreRows{s, columns});
      row_product(seen_columns / W, units_of(width, kFloats), Units<U>{d_out + i * units, units}, Units<U>{vt, columns}, Zero{},
                  StoreRows{dp, columns});
      for (int64_t r = 0; r < count; ++r) {
        gains[0] += dp[r * columns + i + r];
        row_gradients(head, head.lse[i + r], s + r * columns, dp + r * columns, seen_columns, head.causal ? i + r + 1 : n,
                      gains);
      }
      int64_t left_row = columns;
      if constexpr (kFloats == 1) {
        left = ds + at;
      } else {
        left_row = columns / kFloats;
        pair_along(s, count, columns, seen_columns, left, left_row);
        pair_down(s, kTile, columns, seen_columns, ds + at, columns);
        pair_down(dp, kTile, columns, seen_columns, mixing + at, columns);
      }
      row_product(round_up(width, W) / W, units_of(seen, kFloats), Units<U>{left, left_row}, Units<U>{k, padded}, Zero{},
                  [&](int r, int64_t c, vf x) {
                    if (r < count) store_up_to(static_cast<T*>(grad.dq.data) + (i + r) * grad.dq.stride + c, x, width - c);
                  });
    }
    // If causal, key j is visible from row j on; tiles of rows and of keys begin at the same tokens.
    for (int64_t j = 0; j < (head.causal ? end : n); j += kTile) {
      const int64_t first = head.causal ? std::max(block, j) : block, at = (first - block) / kFloats * columns + j;
      const auto accumulate = [&](float* sums, const U* matrix, const U* right) {
        row_product(round_up(width, W) / W, units_of(end - first, kFloats), Units<U>{matrix + at, 1, columns},
                    Units<U>{right + first / kFloats * padded, padded},
                    LoadRows{sums + j * padded, padded}, StoreRows{sums + j * padded, padded});
      };
      accumulate(dk, ds, q_stacked);
      accumulate(dv, mixing, d_out_stacked);
    }
  }
  unpack<T>(dk, padded, n, head.length, width, grad.dk);
  unpack<T>(dv, padded, n, head.length, width, grad.dv);
  for (int64_t i = n; i < head.length; ++i) std::memset(static_cast<T*>(grad.dq.data) + i * grad.dq.stride, 0, width * sizeof(T));
}
