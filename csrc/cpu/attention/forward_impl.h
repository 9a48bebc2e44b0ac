// Forward of shaped attention, one head. Included after small_product.h, inside the namespace of an instruction set.
//
// The head is copied into scratch that fits the second-level cache: the rows of a head are apart in memory, often by a power of
// two, so that they would evict each other from the first-level cache. Then kTile rows at a time are processed: logits, softmax,
// mixing weights, product with v. The mixing weights beta A - gamma C are one matrix, so that one product suffices.

struct Scratch {
  float* next;

  template <class U>
  U* take(int64_t units) {
    next += units;
    return reinterpret_cast<U*>(next - units);
  }
};

VINLINE int64_t units_of(int64_t floats, int unit) { return (floats + unit - 1) / unit; }

// Returns a number of floats that suffices for every type. Leaves room for a tile, which reads up to a vector past a matrix.
inline int64_t attention_scratch_floats(int64_t length, int64_t width, bool is_backward) {
  const int64_t tokens = round_up(length, kTile), columns = round_up(length, kStep), padded = round_up(width, 2 * W);
  const int64_t rows = is_backward ? std::min(kBlockRows, tokens) + 2 * kTile : kTile;
  return (is_backward ? 7 : 2) * tokens * padded + (is_backward ? 2 : 1) * columns * padded + 2 * rows * columns + 4 * W;
}

// Replaces a row of unscaled logits [columns] by mixing weights: beta softmax - gamma uniform over the `count` visible keys, 0
// after them. Returns the log-sum-exp of the scaled logits.
inline float mixing_weights(float* row, int64_t columns, int64_t count, float scale, float beta, float gamma) {
  const vi lanes = iota();
  const int64_t whole = count / W * W;
  vf most = splat(-std::numeric_limits<float>::infinity());
  for (int64_t c = 0; c < whole; c += W) most = max(most, load(row + c) * scale);
  if (whole < count) most = max(most, lanes < int32_t(count - whole) ? load(row + whole) * scale : most);
  const float top = highest(most);
  vf sums = {};
  for (int64_t c = 0; c < whole; c += W) {
    const vf e = exp(scaled(scale, load(row + c)) - top);
    store(row + c, e);
    sums += e;
  }
  if (whole < count) {
    const vf e = lanes < int32_t(count - whole) ? exp(scaled(scale, load(row + whole)) - top) : vf{};
    store(row + whole, e);
    sums += e;
  }
  const float total = sum(sums), uniform = gamma / float(count);
  const float factor = beta / total;
  for (int64_t c = 0; c < whole; c += W) store(row + c, load(row + c) * factor - uniform);
  if (whole < count) store(row + whole, lanes < int32_t(count - whole) ? load(row + whole) * factor - uniform : vf{});
  for (int64_t c = round_up(count, W); c < columns; c += W) store(row + c, vf{});
  return top + std::log(total);
}

template <class T>
void attention_forward_typed(const AttentionHead& head, const Rows& out, float* scratch) {
  using U = typename Unit<T>::type;
  constexpr int kFloats = Unit<T>::kFloats;
  const int64_t n = head.valid, width = head.width, tokens = round_up(n, kTile), columns = round_up(n, kStep);
  const int64_t padded = round_up(width, W * kFloats), units = padded / kFloats;  // a row in floats, in units
  Scratch next{scratch};
  U* const q = next.take<U>(tokens * units);
  U* const kt = next.take<U>(units * columns);
  U* const v = next.take<U>(tokens * padded / kFloats);
  float* const weights = next.take<float>(kTile * columns);
  U* const left = kFloats == 1 ? reinterpret_cast<U*>(weights) : next.take<U>(kTile * columns);
  const int64_t left_row = columns / kFloats;
  pack_rows<T>(head.k, n, width, q, units, tokens);
  transpose_rows(q, units, n, units, kt, columns);
  pack_rows<T>(head.q, n, width, q, units, tokens);
  if constexpr (kFloats == 1) pack_rows<T>(head.v, n, width, v, units, tokens);
  else stack_rows<T>(head.v, n, width, v, padded, tokens);

  for (int64_t i = 0; i < n; i += kTile) {
    const int64_t seen = head.causal ? std::min(i + kTile, n) : n, count = std::min<int64_t>(kTile, n - i);
    const int64_t seen_columns = round_up(seen, kStep);
    row_product(seen_columns / W, units_of(width, kFloats), Units<U>{q + i * units, units}, Units<U>{kt, columns}, Zero{},
                StoreRows{weights, columns});
    for (int64_t r = 0; r < count; ++r) {
      const int64_t keys = head.causal ? i + r + 1 : n;
      head.lse[i + r] = mixing_weights(weights + r * columns, seen_columns, keys, head.scale, head.beta, head.gamma);
    }
    if constexpr (kFloats == 2) pair_along(weights, count, columns, seen_columns, left, left_row);
    row_product(
        round_up(width, W) / W, units_of(seen, kFloats), Units<U>{left, left_row}, Units<U>{v, padded},
        [&](int r, int64_t c) { return load_up_to(row_of<T>(head.v, i + r, n) + c, width - c) * head.alpha; },
        [&](int r, int64_t c, vf x) {
          if (r < count) store_up_to(static_cast<T*>(out.data) + (i + r) * out.stride + c, x, width - c);
        });
  }
  for (int64_t i = n; i < head.length; ++i) {
    std::memset(static_cast<T*>(out.data) + i * out.stride, 0, head.width * sizeof(T));
    head.lse[i] = 0;
  }
}
