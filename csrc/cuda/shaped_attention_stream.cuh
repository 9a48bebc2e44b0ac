// shaped_attention, backward of heads that do not stay in shared memory. A warp owns a tile of 16 queries while all keys pass,
// once for delta and once for dq; then a tile of 16 keys while all queries pass, for dk and dv. So every gradient is summed in
// one warp's registers, and logits are computed three times.
#pragma once

#include "shaped_attention_backward.cuh"

namespace simplclip::gpu {

// Tiles that pass at a time.
template <class T>
inline constexpr int kPassing = kBytes<T> == 2 ? 2 : 1;

enum class Sweep { kDelta, kQueries, kKeys };

template <class T, int kWidth>
struct Stream {
  const ShapedAttentionBackward& p;
  const Head head;
  const int row_bytes, warps, all;
  char *owned, *passing;
  float *lse, *delta, *mean;  // [16 tiles] by query: lse times log2 e, delta, C of a visible key
  GainSums gains;

  SIMPLCLIP_DEVICE explicit Stream(const ShapedAttentionBackward& p)
      : p(p), head(p), row_bytes(p.width * kBytes<T>), warps(threads() / 32), all(tiles_of(head.length)), owned(shared_memory()),
        passing(owned + 2 * warps * kRows * row_bytes),
        lse(reinterpret_cast<float*>(passing + 4 * kPassing<T> * kRows * row_bytes)),
        delta(lse + tiles_of(p.length) * kRows), mean(delta + tiles_of(p.length) * kRows) {}

  SIMPLCLIP_DEVICE float* sums() const { return mean + tiles_of(p.length) * kRows; }

  SIMPLCLIP_DEVICE Tile own(int which) const { return Tile(owned + which * warps * kRows * row_bytes, row_bytes); }

  SIMPLCLIP_DEVICE Tile pass(int turn, int which) const {
    return Tile(passing + (turn % 2 * 2 + which) * kPassing<T> * kRows * row_bytes, row_bytes);
  }

  SIMPLCLIP_DEVICE void load_own(const HeadsView& left, const HeadsView& right, int first) const {
    sync_block();  // the last sweep's readers are done
    stage(own(0), head.rows(left), 0, first * kRows, warps * kRows, head.length);
    stage(own(1), head.rows(right), 0, first * kRows, warps * kRows, head.length);
  }

  // Tiles begin to end - 1 of two matrices pass; calls f(turn, first tile, tiles) for each turn.
  template <class F>
  SIMPLCLIP_DEVICE void stream(const HeadsView& left, const HeadsView& right, int begin, int end, F&& f) const {
    const int turns = (end - begin + kPassing<T> - 1) / kPassing<T>;
    auto load = [&](int turn) {
      if (turn < turns) {
        const int first = begin + turn * kPassing<T>;
        stage(pass(turn, 0), head.rows(left), 0, first * kRows, kPassing<T> * kRows, head.length);
        stage(pass(turn, 1), head.rows(right), 0, first * kRows, kPassing<T> * kRows, head.length);
      }
      cp_async_commit();
    };
    load(0);
    load(1);
    for (int turn = 0; turn < turns; ++turn) {
      const int first = begin + turn * kPassing<T>;
      cp_async_wait<1>();
      sync_block();
      f(turn, first, smaller(kPassing<T>, end - first));
      sync_block();
      load(turn + 2);
    }
  }

  // One turn of a sweep for the warp's tile. Rows are the tile's, columns those that pass. delta, dq: `sum`; dk, dv: `sum`
  // and `other`.
  template <Sweep kSweep>
  SIMPLCLIP_DEVICE void turn(
      int tile, int turn, int first, int count, float (&sum)[kWidth / kRows][2][4], float (&other)[kWidth / kRows][2][4],
      float (&row_delta)[2]) {
    constexpr bool kKeys = kSweep == Sweep::kKeys;
    float s[kPassing<T>][2][4] = {}, dp[kPassing<T>][2][4] = {};
    multiply_rows<T, kPassing<T>>(s, own(0), warp(), 0, pass(turn, 0), count, row_bytes);
    multiply_rows<T, kPassing<T>>(dp, own(1), warp(), 0, pass(turn, 1), count, row_bytes);
    const float scale = p.scale * kLog2E;
#pragma unroll
    for (int i = 0; i < kPassing<T>; ++i) {
      if (i < count && !(p.causal && (kKeys ? first + i < tile : first + i > tile))) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const int row = tile * kRows + lane() / 4 + j / 2 % 2 * 8;
          const int column = (first + i) * kRows + j / 4 * 8 + lane() % 4 * 2 + j % 2;
          const int query = kKeys ? column : row, key = kKeys ? row : column;
          const bool visible = key < (p.causal ? query + 1 : head.length);
          float &x = s[i][j / 4][j % 4], &y = dp[i][j / 4][j % 4];
          const float probability = visible ? fast_exp2(x * scale - lse[query]) : 0;
          const float average = visible ? mean[query] : 0;
          if constexpr (kSweep == Sweep::kDelta) {
            row_delta[j / 2 % 2] += probability * y;
            gains.gamma -= average * y;
            if (query == key) gains.alpha += y;
          } else {
            y = head.beta * probability * (y - delta[query]);
            x = head.beta * probability - head.gamma * average;
          }
        }
        if constexpr (kSweep != Sweep::kDelta) {
          const Operand<T> ds = pack<T>(dp[i]), joined = pack<T>(s[i]);
#pragma unroll
          for (int j = 0; j < kWidth / kRows; ++j) {
            if (j * kRows < p.width) {
              multiply_columns<T>(sum[j], ds, pass(turn, 0), i, j);
              if constexpr (kKeys) multiply_columns<T>(other[j], joined, pass(turn, 1), i, j);
            }
          }
        }
      }
    }
  }

  SIMPLCLIP_DEVICE void queries(int first) {
    const int tile = first + warp(), end = p.causal ? smaller(all, first + warps) : all;
    float sum[kWidth / kRows][2][4] = {}, row_delta[2] = {};
    load_own(p.q, p.grad, first);
    stream(p.k, p.v, 0, end, [&](int t, int from, int count) {
      if (tile < all) turn<Sweep::kDelta>(tile, t, from, count, sum, sum, row_delta);
    });
#pragma unroll
    for (int low = 0; low < 2; ++low) {
      gains.beta += row_delta[low];
      const float whole = row_sum(row_delta[low]);
      if (tile < all && lane() % 4 == 0) delta[tile * kRows + lane() / 4 + 8 * low] = whole;
    }
    stream(p.k, p.v, 0, end, [&](int t, int from, int count) {
      if (tile < all) turn<Sweep::kQueries>(tile, t, from, count, sum, sum, row_delta);
    });
#pragma unroll
    for (int i = 0; i < kWidth / kRows; ++i) {
      if (i * kRows < p.width) scaled_store(sum[i], head.rows(p.dq), tile, i);
    }
  }

  SIMPLCLIP_DEVICE void keys(int first) {
    const int tile = first + warp();
    float sum[kWidth / kRows][2][4] = {}, other[kWidth / kRows][2][4] = {}, unused[2];
    load_own(p.k, p.v, first);
    stream(p.q, p.grad, p.causal ? first : 0, all, [&](int t, int from, int count) {
      if (tile < all) turn<Sweep::kKeys>(tile, t, from, count, sum, other, unused);
    });
#pragma unroll
    for (int i = 0; i < kWidth / kRows; ++i) {
      if (i * kRows < p.width) {
        float outer[2][4];
        load_global<T>(outer, head.rows(p.grad), tile, i, head.length);
#pragma unroll
        for (int j = 0; j < 8; ++j) other[i][j / 4][j % 4] += head.alpha * outer[j / 4][j % 4];
        store_global<T>(other[i], head.rows(p.dv), tile, i, head.length, p.length);
        scaled_store(sum[i], head.rows(p.dk), tile, i);
      }
    }
  }

  SIMPLCLIP_DEVICE void scaled_store(float (&sum)[2][4], const HeadRows& to, int tile, int column_tile) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[j / 4][j % 4] *= p.scale;
    store_global<T>(sum, to, tile, column_tile, head.length, p.length);
  }

  SIMPLCLIP_DEVICE void run() {
    const int tiles = tiles_of(p.length);
    for (int i = thread(); i < tiles * kRows; i += threads()) {
      lse[i] = i < head.length ? head.lse(p)[i] * kLog2E : 0;
      mean[i] = 1.0f / (p.causal ? i + 1 : head.length);
    }
    for (int first = 0; first < tiles; first += warps) queries(first);
    for (int first = 0; first < tiles; first += warps) keys(first);
    gains.store(sums(), p, head);
  }
};

template <class T, int kWidth, int kThreads, int kBlocks>
SIMPLCLIP_KERNEL void __launch_bounds__(kThreads, kBlocks)
    shaped_attention_stream_kernel(const __grid_constant__ ShapedAttentionBackward p) {
  Stream<T, kWidth>(p).run();
}

}  // namespace simplclip::gpu
