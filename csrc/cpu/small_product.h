// Products of small matrices, in float32, whose right operand stays in the cache. Included after half.h, inside the namespace
// of an instruction set.

constexpr int kTile = 6;                        // rows of a tile
constexpr int kTileVectors = W == 16 ? 4 : 2;   // columns of it, in vectors: with kTile rows they fill the registers

VINLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// kTile rows of init + a b, V vectors wide. a(r, p) = a[r * a_row + p * a_column]; b has rows of b_row floats.
template <int V, class Init, class Finish>
VINLINE void tile_product(int64_t column, int64_t depth, const float* a, int64_t a_row, int64_t a_column, const float* b,
                          int64_t b_row, const Init& init, const Finish& finish) {
  vf sum[kTile][V];
#pragma GCC unroll 8
  for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < V; ++c) sum[r][c] = init(r, column + c * W);
  b += column;
  for (int64_t p = 0; p < depth; ++p) {
    vf right[V];
#pragma GCC unroll 4
    for (int c = 0; c < V; ++c) right[c] = load(b + p * b_row + c * W);
#pragma GCC unroll 8
    for (int r = 0; r < kTile; ++r) {
      const vf left = splat(a[r * a_row + p * a_column]);
#pragma GCC unroll 4
      for (int c = 0; c < V; ++c) sum[r][c] += left * right[c];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < V; ++c) finish(r, column + c * W, sum[r][c]);
}

// The same for a whole row of tiles: `vectors` vectors, in tiles that are as equal as can be.
template <class Init, class Finish>
VINLINE void row_product(int64_t vectors, int64_t depth, const float* a, int64_t a_row, int64_t a_column, const float* b,
                         int64_t b_row, const Init& init, const Finish& finish) {
  const int64_t tiles = (vectors + kTileVectors - 1) / kTileVectors;
  for (int64_t t = 0, first = 0; t < tiles; ++t) {
    const int64_t count = (vectors - first + tiles - t - 1) / (tiles - t), column = first * W;
    if constexpr (kTileVectors == 4) {
      if (count == 4) tile_product<4>(column, depth, a, a_row, a_column, b, b_row, init, finish);
      if (count == 3) tile_product<3>(column, depth, a, a_row, a_column, b, b_row, init, finish);
    }
    if (count == 2) tile_product<2>(column, depth, a, a_row, a_column, b, b_row, init, finish);
    if (count == 1) tile_product<1>(column, depth, a, a_row, a_column, b, b_row, init, finish);
    first += count;
  }
}

template <int S, int... J>
VINLINE void exchange(vf& a, vf& b, std::integer_sequence<int, J...>) {
  const vf low = __builtin_shufflevector(a, b, ((J & S) ? W + J - S : J)...);
  b = __builtin_shufflevector(a, b, ((J & S) ? W + J : J + S)...);
  a = low;
}

template <int S>
VINLINE void transpose_step(vf (&t)[W]) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & S)) exchange<S>(t[i], t[i + S], std::make_integer_sequence<int, W>());
}

VINLINE void transpose(vf (&t)[W]) {
  transpose_step<1>(t);
  transpose_step<2>(t);
  if constexpr (W > 4) transpose_step<4>(t);
  if constexpr (W > 8) transpose_step<8>(t);
}

// Rows [0, count) of float type T, `width` wide, to rows of `to_row` floats; zeros up to `to_row` and in rows up to `padded`.
template <class T>
inline void pack(const Rows& from, int64_t count, int64_t width, float* to, int64_t to_row, int64_t padded) {
  for (int64_t i = 0; i < count; ++i) {
    const T* p = static_cast<const T*>(from.data) + i * from.stride;
    int64_t c = 0;
    for (; c + W <= width; c += W) store(to + i * to_row + c, load(p + c));
    if (c < width) store(to + i * to_row + c, load(p + c, int(width - c))), c += W;
    for (; c < to_row; c += W) store(to + i * to_row + c, vf{});
  }
  std::memset(to + count * to_row, 0, (padded - count) * to_row * sizeof(float));
}

// The transpose of rows of float32 [count, width], as pack leaves them: [width, to_row], zeros behind `count`.
inline void transpose_rows(const float* from, int64_t from_row, int64_t count, int64_t width, float* to, int64_t to_row) {
  for (int64_t i = 0; i < to_row; i += W)
    for (int64_t c = 0; c < width; c += W) {
      vf block[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) block[r] = i + r < count ? load(from + (i + r) * from_row + c) : vf{};
      transpose(block);
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) store(to + (c + r) * to_row + i, block[r]);
    }
}

// `count` rows of float32, each from_row floats apart, to rows of float type T; zeros in those up to `length`.
template <class T>
inline void unpack(const float* from, int64_t from_row, int64_t count, int64_t length, int64_t width, const Rows& to) {
  for (int64_t i = 0; i < length; ++i) {
    T* p = static_cast<T*>(to.data) + i * to.stride;
    if (i >= count) {
      std::memset(p, 0, width * sizeof(T));
      continue;
    }
    int64_t c = 0;
    for (; c + W <= width; c += W) store(p + c, load(from + i * from_row + c));
    if (c < width) store(p + c, load(from + i * from_row + c), int(width - c));
  }
}
