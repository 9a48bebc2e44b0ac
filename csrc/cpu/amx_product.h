// Products of the operands of small_product.h in the tile registers of Intel AMX. Included by small_product.h.
//
// A tile register has 16 rows of 16 units. The instructions take the left operand in rows form, the right operand in columns
// form or stacked form.

constexpr int kTile = 32;            // rows of a product: two tiles
constexpr int64_t kStep = 32;        // bfloat16 that an instruction sums over; rows of a matrix are padded to a multiple of kStep
constexpr int64_t kBlockRows = 288;  // rows of backward's matrices [rows, L]: a multiple of kTile

// Configures the eight tile registers of this thread to their full size. The destructor restores the earlier configuration, but
// not the contents of the registers.
class Tiles {
 public:
  Tiles() {
    asm volatile("sttilecfg (%0)" : : "r"(&before_) : "memory");
    Shape whole = {};
    whole.palette = 1;
    for (int t = 0; t < 8; ++t) whole.row_bytes[t] = 64, whole.rows[t] = 16;
    set(whole);
  }
  ~Tiles() { set(before_); }
  Tiles(const Tiles&) = delete;

 private:
  struct alignas(64) Shape {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } before_;

  static void set(const Shape& shape) { asm volatile("ldtilecfg (%0)" : : "r"(&shape) : "memory"); }
};

// The number of a tile register is a part of the instruction. The clobber "memory" keeps an instruction behind earlier stores.
template <int tile>
VINLINE void tile_zero() { asm volatile("tilezero %%tmm%c0" : : "i"(tile) : "memory"); }

template <int tile>
VINLINE void tile_load(const void* from, int64_t row_units) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row_units * 4), "i"(tile) : "memory");
}

template <int tile>
VINLINE void tile_store(void* to, int64_t row_units) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(row_units * 4), "i"(tile) : "memory");
}

template <int sum, int left, int right>
VINLINE void tile_multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(left), "i"(right) : "memory");
}

// Passes kTile rows of init + a b, V tiles wide, to `finish`. Tile registers 0 and 1 hold the upper 16 rows of the sums, 2 and 3
// the lower ones. The rows of a are contiguous.
template <int V, class Init, class Finish>
VINLINE void tile_product(int64_t column, int64_t depth, Units<uint32_t> a, Units<uint32_t> b, const Init& init,
                          const Finish& finish) {
  alignas(64) float buffer[kTile * V * W];
  constexpr int64_t row = V * W, half = kTile / 2;
  if constexpr (std::is_same_v<Init, Zero>) {
    tile_zero<0>(), tile_zero<2>();
    if constexpr (V == 2) tile_zero<1>(), tile_zero<3>();
  } else {
    LoadRows begin{buffer, row};
    if constexpr (std::is_same_v<Init, LoadRows>) {
      begin = {init.from + column, init.row};
    } else {
      for (int r = 0; r < kTile; ++r)
        for (int c = 0; c < row; c += W) store(buffer + r * row + c, init(r, column + c));
    }
    tile_load<0>(begin.from, begin.row), tile_load<2>(begin.from + half * begin.row, begin.row);
    if constexpr (V == 2)
      tile_load<1>(begin.from + W, begin.row), tile_load<3>(begin.from + half * begin.row + W, begin.row);
  }
  for (int64_t p = 0; p < depth; p += kStep / 2) {
    const uint32_t* const right = b.data + p * b.row + column;
    tile_load<4>(a.data + p, a.row);
    tile_load<5>(a.data + half * a.row + p, a.row);
    tile_load<6>(right, b.row);
    tile_multiply_add<0, 4, 6>();
    tile_multiply_add<2, 5, 6>();
    if constexpr (V == 2) {
      tile_load<7>(right + W, b.row);
      tile_multiply_add<1, 4, 7>();
      tile_multiply_add<3, 5, 7>();
    }
  }
  StoreRows end{buffer, row};
  if constexpr (std::is_same_v<Finish, StoreRows>) end = {finish.to + column, finish.row};
  tile_store<0>(end.to, end.row), tile_store<2>(end.to + half * end.row, end.row);
  if constexpr (V == 2) tile_store<1>(end.to + W, end.row), tile_store<3>(end.to + half * end.row + W, end.row);
  if constexpr (!std::is_same_v<Finish, StoreRows>)
    for (int r = 0; r < kTile; ++r)
      for (int c = 0; c < row; c += W) finish(r, column + c, load(buffer + r * row + c));
}

// Passes kTile rows of init + a b to `finish`. Along the summed dimension both operands are padded to a multiple of kStep
// elements: one operand by zeros, the other by any finite numbers.
template <class Init, class Finish>
VINLINE void row_product(int64_t vectors, int64_t depth, Units<uint32_t> a, Units<uint32_t> b, const Init& init,
                         const Finish& finish) {
  alignas(64) uint32_t left[kTile * kBlockRows / 2];
  if (a.column != 1) {  // the transpose of a matrix of at most kBlockRows rows
    const int64_t row = round_up(depth, kStep / 2);
    transpose_rows(a.data, a.column, row, kTile, left, row);
    a = {left, row};
  }
  int64_t v = 0;
  for (; v + 2 <= vectors; v += 2) tile_product<2>(v * W, depth, a, b, init, finish);
  if (v < vectors) tile_product<1>(v * W, depth, a, b, init, finish);
}
