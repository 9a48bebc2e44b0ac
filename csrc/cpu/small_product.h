// Products of small matrices whose right operand stays in the cache, summed in float32. Included after vec.h, inside the
// namespace of an instruction set.
//
// An operand consists of 32-bit units. A unit is a float or, where the instruction set multiplies bfloat16, two bfloat16 that
// are neighbours along the summed dimension. Therefore a matrix has three forms, all in units:
//   rows      [count, width]      left operand, summed over the width
//   columns   [width, count]      the transpose of rows: right operand, summed over the width
//   stacked   [count, width]      right operand, summed over the rows (for floats the same as rows)

template <class T>
struct Unit {
  using type = float;
  static constexpr int kFloats = 1;
};

#if defined(SIMPLCLIP_NATIVE_BF16)
template <>
struct Unit<bf16> {
  using type = uint32_t;
  static constexpr int kFloats = 2;
};
#endif

VINLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// A matrix of units, (i, j) at data[i * row + j * column].
template <class U>
struct Units {
  const U* data;
  int64_t row, column = 1;
};

// `init` and `finish` of a product: begin with zeros or float32 sums, store float32. Row r counts from the first of the tile.
struct Zero {
  VINLINE vf operator()(int, int64_t) const { return vf{}; }
};

struct LoadRows {
  const float* from;
  int64_t row;
  VINLINE vf operator()(int r, int64_t c) const { return load(from + r * row + c); }
};

struct StoreRows {
  float* to;
  int64_t row;
  VINLINE void operator()(int r, int64_t c, vf x) const { store(to + r * row + c, x); }
};

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

// Returns row i of a head, but the last row for i >= count, so that a loop may read past the end. No result depends on that.
template <class T>
VINLINE const T* row_of(const Rows& from, int64_t i, int64_t count) {
  return static_cast<const T*>(from.data) + least(i, count - 1) * from.stride;
}

// Writes the rows form of `count` rows, each padded by zeros to to_row units. Rows from `count` to `padded` are zeros.
template <class T>
inline void pack_rows(const Rows& from, int64_t count, int64_t width, float* to, int64_t to_row, int64_t padded) {
  for (int64_t i = 0; i < count; ++i, to += to_row) {
    const T* p = row_of<T>(from, i, count);
    each_block(width, [&](int64_t c, auto lanes) __attribute__((always_inline)) { store(to + c, load(p + c, lanes)); });
    for (int64_t c = round_up(width, W); c < to_row; c += W) store(to + c, vf{});
  }
  std::memset(to, 0, (padded - count) * to_row * sizeof(float));
}

template <class T>
inline void pack_rows(const Rows& from, int64_t count, int64_t width, uint32_t* to, int64_t to_row, int64_t padded) {
  for (int64_t i = 0; i < count; ++i, to += to_row) {
    std::memcpy(to, row_of<T>(from, i, count), width * sizeof(T));
    std::memset(reinterpret_cast<T*>(to) + width, 0, to_row * sizeof(*to) - width * sizeof(T));
  }
  std::memset(to, 0, (padded - count) * to_row * sizeof(*to));
}

// Writes the stacked form of pairs, in rows of to_row units: row i has rows 2i and 2i + 1 of the head. Rows of the head from
// `count` to `padded` are zeros.
template <class T>
inline void stack_rows(const Rows& from, int64_t count, int64_t width, uint32_t* to, int64_t to_row, int64_t padded) {
  for (int64_t i = 0; i < count; i += 2, to += to_row) {
    const T *low = row_of<T>(from, i, count), *high = row_of<T>(from, i + 1, count);
    const vu mask = vu{} + (i + 1 < count ? 0xffff0000u : 0u);
    each_block(width, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
      const vu pair = ((vu)load(low + c, lanes) >> 16) | ((vu)load(high + c, lanes) & mask);
      std::memcpy(to + c, &pair, sizeof pair);
    });
    for (int64_t c = round_up(width, W); c < to_row; c += W) std::memset(to + c, 0, W * sizeof(*to));
  }
  std::memset(to, 0, (padded / 2 - (count + 1) / 2) * to_row * sizeof(*to));
}

// Writes the columns form [width, to_row] of `count` rows that are in rows form. Columns from `count` on are zeros.
template <class U>
inline void transpose_rows(const U* rows, int64_t from_row, int64_t count, int64_t width, U* columns, int64_t to_row) {
  const float* const from = reinterpret_cast<const float*>(rows);  // 32 bits of any type
  float* const to = reinterpret_cast<float*>(columns);
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

// Converts float32 [rows, columns] to a left operand whose pairs are neighbours in a row.
VINLINE void pair_along(const float* from, int64_t rows, int64_t from_row, int64_t columns, uint32_t* to, int64_t to_row) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; c += W) store(reinterpret_cast<bf16*>(to + r * to_row) + c, load(from + r * from_row + c));
}

// Converts float32 [rows, columns] to a left operand whose pairs are neighbours in a column: row i has rows 2i and 2i + 1.
VINLINE void pair_down(const float* from, int64_t rows, int64_t from_row, int64_t columns, uint32_t* to, int64_t to_row) {
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t c = 0; c < columns; c += W) {
      const vh low = rounded(load(from + r * from_row + c));
      const vh high = r + 1 < rows ? rounded(load(from + (r + 1) * from_row + c)) : vh{};
      const vu pair = __builtin_convertvector(low, vu) | (__builtin_convertvector(high, vu) << 16);
      std::memcpy(to + r / 2 * to_row + c, &pair, sizeof pair);
    }
}

// Converts `count` rows of float32, from_row floats apart, to rows of float type T. Rows from `count` to `length` become zeros.
template <class T>
inline void unpack(const float* from, int64_t from_row, int64_t count, int64_t length, int64_t width, const Rows& to) {
  for (int64_t i = 0; i < length; ++i) {
    T* p = static_cast<T*>(to.data) + i * to.stride;
    if (i >= count) {
      std::memset(p, 0, width * sizeof(T));
      continue;
    }
    each_block(width, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
      store(p + c, load(from + i * from_row + c), lanes);
    });
  }
}

// Defines row_product, the product of kTile rows of a left operand and a right one, and the multiples for padding operands.
#include "vector_product.h"
