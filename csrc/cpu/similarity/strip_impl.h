// Included after vec.h, inside the namespace of an instruction set. See strip.h.

constexpr float kInf = std::numeric_limits<float>::infinity();
// A column sum below this may have lost terms that underflowed relative to the strip's reference; it is summed again.
constexpr float kLostBelow = 1e-28f;

// Calls f(j, lanes, masked) for every block of W columns, as each_block does; masked is true if a lane may have to be masked.
template <class F>
VINLINE void for_blocks(int64_t columns, int64_t first_label, int64_t labels, bool mask_all, F&& f) {
  const int64_t full = columns / W * W;
  const int64_t lo = mask_all ? 0 : least(first_label / W * W, full);
  const int64_t hi = mask_all ? full : least((first_label + labels + W - 1) / W * W, full);
  constexpr std::integral_constant<int, W> all;
  int64_t j = 0;
  for (; j < lo; j += W) f(j, all, std::false_type{});
  for (; j < hi; j += W) f(j, all, std::true_type{});
  for (; j < full; j += W) f(j, all, std::false_type{});
  if (full < columns) f(full, int(columns - full), std::true_type{});
}

// Lanes of block j: `own` is row i's own pair, `belongs` are all that belong to row i, and `outside` the lanes without a column.
struct PairLanes {
  vi own, belongs, outside;

  VINLINE PairLanes(const Pairs& pairs, int64_t i, int64_t j, int lanes) {
    const vi lane = iota();
    own = belongs = (lane + int32_t(j)) == int32_t(pairs.label + i);
    if (pairs.ids) belongs |= load(pairs.text_ids + j, lanes) == pairs.ids[i];
    outside = lanes < W ? lane >= lanes : vi{};
  }

  VINLINE vi no_negatives() const { return belongs | outside; }
};

// Whether any block of a row may have columns that belong to it, not only the block with its own pair.
VINLINE bool everywhere(const Pairs& pairs) { return pairs.ids != nullptr; }

// Lanes of block j that are not negatives of row i in the softmaxes.
VINLINE vi dropped_lanes(const Strip& s, int64_t i, int64_t j, int lanes) {
  return PairLanes(s.pairs, i, j, lanes).no_negatives();
}

template <class T, class Lanes>
VINLINE vf load_block(const void* base, const Strip& s, int64_t i, int64_t j, Lanes lanes) {
  return load(static_cast<const T*>(base) + i * s.columns + j, lanes);
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
