// Matrices in shared memory, and copies between registers and memory.
#pragma once

#include "instructions.cuh"

namespace simplclip::gpu {

struct tf32 {};  // tensors in float32, products in TF32

template <class T>
inline constexpr int kBytes = 2;
template <>
inline constexpr int kBytes<tf32> = 4;

inline constexpr int kRows = 16;   // rows and columns of a tile
inline constexpr int kChunk = 16;  // bytes that ldmatrix and cp.async copy at a time

SIMPLCLIP_DEVICE constexpr int tiles_of(int rows) { return (rows + kRows - 1) / kRows; }
SIMPLCLIP_DEVICE constexpr int smaller(int a, int b) { return a < b ? a : b; }
SIMPLCLIP_DEVICE constexpr int between(int low, int value, int high) { return value < low ? low : smaller(value, high); }

// A head of a tensor [B, L, H, K] in global memory: its first row and the stride of rows in bytes.
struct HeadRows {
  char* data;
  int64_t stride;

  SIMPLCLIP_DEVICE char* row(int row) const { return data + row * stride; }
};

// A matrix in shared memory, whose rows are a multiple of 32 bytes. ldmatrix reads the chunks of eight rows in one column. They
// are in different banks, since a chunk's position is its index xor bits of its row: bits 0 to 2 in rows of 8 chunks or a
// multiple, bits 1 and 2 in rows of 4, bit 2 in rows of 2, since 2 or 4 such rows fill the banks once.
struct Tile {
  char* base;
  int stride, shift, mask;

  SIMPLCLIP_DEVICE Tile(char* base, int row_bytes) : base(base), stride(row_bytes) {
    const int chunks = row_bytes / kChunk, factor = chunks & -chunks;
    shift = factor >= 8 ? 0 : factor == 4 ? 1 : 2;
    mask = factor >= 8 ? 7 : factor - 1;
  }

  // The next tile. Loops over tiles advance step by step, since an address for each tile would need too many registers.
  SIMPLCLIP_DEVICE void descend() { base += kRows * stride; }

  // The address of chunk `chunk` of row 16 tile + row; row < 16.
  SIMPLCLIP_DEVICE char* at(int tile, int row, int chunk) const {
    return base + (tile * kRows + row) * stride + ((chunk ^ (row >> shift & mask)) * kChunk);
  }
};

// The block's threads start to copy `rows` rows, from row `first` on; rows from `valid` on are zeros.
SIMPLCLIP_DEVICE void stage(const Tile& tile, const HeadRows& from, int column_byte, int first, int rows, int valid) {
  for (int row = thread() >> 2; row < rows; row += threads() >> 2) {
    const char* source = from.data + (first + row) * from.stride + column_byte;
    for (int chunk = thread() & 3; chunk < tile.stride / kChunk; chunk += 4) {
      cp_async_16(tile.at(row / kRows, row % kRows, chunk), source + chunk * kChunk, first + row < valid);
    }
  }
}

// The left operand [16, 16] of a product, in registers. Its columns are in the order of `pack`.
template <class T>
struct Operand {
  uint32_t r[kBytes<T> == 2 ? 4 : 8];
};

// Converts an mma result in registers to the left operand of the next product. In TF32 column 2 i of 8 replaces column i and
// column 2 i + 1 replaces i + 4, so that a lane has all its elements. The right operand's rows are taken in the same order.
template <class T>
SIMPLCLIP_DEVICE Operand<T> pack(const float (&c)[2][4]) {
  if constexpr (kBytes<T> == 2) {
    return {pack2<T>(c[0][0], c[0][1]), pack2<T>(c[0][2], c[0][3]), pack2<T>(c[1][0], c[1][1]), pack2<T>(c[1][2], c[1][3])};
  } else {
    return {to_tf32(c[0][0]), to_tf32(c[0][2]), to_tf32(c[0][1]), to_tf32(c[0][3]),
            to_tf32(c[1][0]), to_tf32(c[1][2]), to_tf32(c[1][1]), to_tf32(c[1][3])};
  }
}

template <class T>
SIMPLCLIP_DEVICE void load_rows(uint32_t (&r)[4], const void* chunk) {
  ldmatrix_x4(r, chunk);
  if constexpr (kBytes<T> == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i] = to_tf32(as_float(r[i]));
  }
}

// load_left and load_right load 32 bytes of each of 16 rows, from chunk `chunk` on. These are rows of the left operand, or
// columns of the right one.
template <class T>
SIMPLCLIP_DEVICE void load_left(uint32_t (&r)[4], const Tile& m, int tile, int chunk) {
  load_rows<T>(r, m.at(tile, lane() & 15, chunk + (lane() >> 4)));
}

template <class T>
SIMPLCLIP_DEVICE void load_right(uint32_t (&r)[4], const Tile& m, int tile, int chunk) {
  load_rows<T>(r, m.at(tile, (lane() & 7) + (lane() >> 4) * 8, chunk + (lane() >> 3 & 1)));
}

template <class T>
SIMPLCLIP_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  if constexpr (kBytes<T> == 2) {
    mma16816<T>(c, a, b);
  } else {
    mma1688_tf32(c, a, b);
  }
}

// c[i] [16, 16] += a_tile b_i^T for i < tiles, where a_tile is tile `row_tile` of a and b_i is tile i of b. Sums over `bytes` of
// each row, which begin at chunk `chunk` of a and at chunk 0 of b.
template <class T, int kTiles>
SIMPLCLIP_DEVICE void multiply_rows(
    float (&c)[kTiles][2][4], const Tile& a, int row_tile, int chunk, const Tile& b, int tiles, int bytes) {
  if (tiles <= 0) return;  // the rows of a are padding, which nobody has loaded
#pragma unroll 1
  for (int step = 0; step < bytes / kChunk; step += 2) {
    uint32_t left[4], right[2][4];
    load_left<T>(left, a, row_tile, chunk + step);
    Tile below = b;
    load_right<T>(right[0], below, 0, step);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (i < tiles) {
        below.descend();
        if (i + 1 < kTiles && i + 1 < tiles) load_right<T>(right[(i + 1) % 2], below, 0, step);
        multiply<T>(c[i][0], left, right[i % 2][0], right[i % 2][1]);
        multiply<T>(c[i][1], left, right[i % 2][2], right[i % 2][3]);
      }
    }
  }
}

// Returns a float32 element of a tile; row < 16.
SIMPLCLIP_DEVICE float element(const Tile& m, int tile, int row, int column) {
  return *reinterpret_cast<const float*>(m.at(tile, row, column / 4) + column % 4 * 4);
}

// c [16, 16] += a times tile `tile` of b, in columns 16 column_tile to 16 column_tile + 15 of b.
template <class T>
SIMPLCLIP_DEVICE void multiply_columns(float (&c)[2][4], const Operand<T>& a, const Tile& b, int tile, int column_tile) {
  if constexpr (kBytes<T> == 2) {
    uint32_t right[4];
    ldmatrix_x4_trans(right, b.at(tile, lane() & 15, column_tile * 2 + (lane() >> 4)));
    multiply<T>(c[0], a.r, right[0], right[1]);
    multiply<T>(c[1], a.r, right[2], right[3]);
  } else {
    const int column = column_tile * kRows + lane() / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t left[4] = {a.r[4 * half], a.r[4 * half + 1], a.r[4 * half + 2], a.r[4 * half + 3]};
      const int row = 8 * half + lane() % 4 * 2;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint32_t even = to_tf32(element(b, tile, row, column + 8 * n));
        const uint32_t odd = to_tf32(element(b, tile, row + 1, column + 8 * n));
        multiply<T>(c[n], left, even, odd);
      }
    }
  }
}

template <class T>
SIMPLCLIP_DEVICE void store_operand(const Tile& m, int row_tile, int column_tile, const Operand<T>& a) {
  const int row = lane() / 4, pair = lane() % 4;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int low = 0; low < 2; ++low) {
      if constexpr (kBytes<T> == 2) {
        *reinterpret_cast<uint32_t*>(m.at(row_tile, row + 8 * low, column_tile * 2 + n) + pair * 4) = a.r[2 * n + low];
      } else {
        char* to = m.at(row_tile, row + 8 * low, column_tile * 4 + n * 2 + pair / 2) + pair % 2 * 8;
        *reinterpret_cast<uint2*>(to) = {a.r[4 * n + low], a.r[4 * n + 2 + low]};
      }
    }
  }
}

// Returns the transpose of a stored tile as a left operand: row i is the stored column 16 column_tile + i.
template <class T>
SIMPLCLIP_DEVICE Operand<T> load_transposed(const Tile& m, int row_tile, int column_tile) {
  Operand<T> a;
  if constexpr (kBytes<T> == 2) {
    ldmatrix_x4_trans(a.r, m.at(row_tile, (lane() & 7) + (lane() >> 4) * 8, column_tile * 2 + (lane() >> 3 & 1)));
  } else {
    const int column = column_tile * kRows + lane() / 4;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = i / 4 * 8 + lane() % 4 * 2 + i / 2 % 2;
      a.r[i] = __builtin_bit_cast(uint32_t, element(m, row_tile, row, column + i % 2 * 8));
    }
  }
  return a;
}

// Loads a lane's elements of columns 16 column_tile to 16 column_tile + 15, rows lane / 4 and lane / 4 + 8 of a tile, in mma's
// layout. Rows from `valid` on are zeros and are not read.
template <class T>
SIMPLCLIP_DEVICE void load_global(float (&c)[2][4], const HeadRows& from, int tile, int column_tile, int valid) {
#pragma unroll
  for (int low = 0; low < 2; ++low) {
    const int row = tile * kRows + lane() / 4 + 8 * low;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float2 pair{0, 0};
      if (row < valid) {
        const char* at = from.row(row) + (column_tile * kRows + n * 8 + lane() % 4 * 2) * kBytes<T>;
        if constexpr (kBytes<T> == 2) {
          pair = unpack2<T>(*reinterpret_cast<const uint32_t*>(at));
        } else {
          pair = *reinterpret_cast<const float2*>(at);
        }
      }
      c[n][2 * low] = pair.x;
      c[n][2 * low + 1] = pair.y;
    }
  }
}

// Writes elements in the layout of load_global, and zeros to the rows from `valid` to `rows`. Four lanes write 32 bytes of a row
// at a time; with 16-bit elements pairs of lanes first exchange elements.
template <class T>
SIMPLCLIP_DEVICE void store_global(
    const float (&c)[2][4], const HeadRows& to, int tile, int column_tile, int valid, int rows) {
#pragma unroll
  for (int low = 0; low < 2; ++low) {
    const int row = tile * kRows + lane() / 4 + 8 * low, pair = lane() % 4;
    const bool zero = row >= valid;
    const float2 left = zero ? float2{0, 0} : float2{c[0][2 * low], c[0][2 * low + 1]};
    const float2 right = zero ? float2{0, 0} : float2{c[1][2 * low], c[1][2 * low + 1]};
    char* at = to.row(row) + column_tile * kRows * kBytes<T>;
    if constexpr (kBytes<T> == 2) {
      const uint32_t first = pack2<T>(left.x, left.y), second = pack2<T>(right.x, right.y);
      const bool odd = pair % 2;
      const uint32_t other = shuffle_xor(odd ? first : second, 1);
      char* eight = at + odd * 16 + pair / 2 * 8;
      if (row < rows) *reinterpret_cast<uint2*>(eight) = odd ? uint2{other, second} : uint2{first, other};
    } else if (row < rows) {
      *reinterpret_cast<float2*>(at + pair * 8) = left;
      *reinterpret_cast<float2*>(at + 32 + pair * 8) = right;
    }
  }
}

// Sums and maxima over the four lanes that share a row, and over a warp.
SIMPLCLIP_DEVICE float row_sum(float value) {
  value += shuffle_xor(value, 1);
  return value + shuffle_xor(value, 2);
}

SIMPLCLIP_DEVICE float row_max(float value) {
  value = fmaxf(value, shuffle_xor(value, 1));
  return fmaxf(value, shuffle_xor(value, 2));
}

SIMPLCLIP_DEVICE float warp_sum(float value) {
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

}  // namespace simplclip::gpu
