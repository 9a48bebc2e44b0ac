// Products of the operands of small_product.h in vector registers. Included by small_product.h.

constexpr int kTile = 6;                       // rows of a tile
constexpr int kTileVectors = W == 16 ? 4 : 2;  // columns of a tile, in vectors; its sums fill the registers
constexpr int64_t kStep = W;                   // floats; rows of a matrix are padded to a multiple of kStep
constexpr int64_t kBlockRows = 240;            // rows of backward's matrices [rows, L]: a multiple of kTile

VINLINE void multiply_add(vf& sum, float left, const float* right) { sum += splat(left) * load(right); }

#if defined(SIMPLCLIP_NATIVE_BF16)
VINLINE void multiply_add(vf& sum, uint32_t left, const uint32_t* right) {
  sum = (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(left)), (__m512bh)_mm512_loadu_si512(right));
}
#endif

// Passes kTile rows of init + a b, V vectors wide, to `finish`. The columns of b are contiguous.
template <int V, class U, class Init, class Finish>
VINLINE void tile_product(int64_t column, int64_t depth, Units<U> a, Units<U> b, const Init& init, const Finish& finish) {
  vf sum[kTile][V];
#pragma GCC unroll 8
  for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < V; ++c) sum[r][c] = init(r, column + c * W);
  b.data += column;
  for (int64_t p = 0; p < depth; ++p) {
#pragma GCC unroll 8
    for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < V; ++c) multiply_add(sum[r][c], a.data[r * a.row + p * a.column], b.data + p * b.row + c * W);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < V; ++c) finish(r, column + c * W, sum[r][c]);
}

// Passes kTile rows of init + a b, `vectors` vectors wide, to `finish`. Divides them into tiles of about equal width.
template <class U, class Init, class Finish>
VINLINE void row_product(int64_t vectors, int64_t depth, Units<U> a, Units<U> b, const Init& init, const Finish& finish) {
  const int64_t tiles = (vectors + kTileVectors - 1) / kTileVectors;
  for (int64_t t = 0, first = 0; t < tiles; ++t) {
    const int64_t count = (vectors - first + tiles - t - 1) / (tiles - t), column = first * W;
    if constexpr (kTileVectors == 4) {
      if (count == 4) tile_product<4>(column, depth, a, b, init, finish);
      if (count == 3) tile_product<3>(column, depth, a, b, init, finish);
    }
    if (count == 2) tile_product<2>(column, depth, a, b, init, finish);
    if (count == 1) tile_product<1>(column, depth, a, b, init, finish);
    first += count;
  }
}
