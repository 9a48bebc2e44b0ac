// shaped_attention, backward of heads that do not fit in shared memory. A warp has a tile of 16 queries and reads all
// keys twice, for delta and for dq; then it has a tile of 16 keys and reads all queries, for dk and dv. So every gradient is
// summed in the registers of one warp, and logits are computed three times.
#pragma once

#include "backward.cuh"

namespace simplclip::gpu {

enum class Sweep { kDelta, kQueries, kKeys };

template <class T, int kWidth>
struct Stream {
  const ShapedAttentionBackward& p;
  const Head head;
  const int row_bytes, warps, all;
  char *owned, *slots;
  float *lse, *delta, *mean;  // [16 tiles] by query: lse times log2 e, delta, C of a visible key
  GainSums gains;

  SIMPLCLIP_DEVICE explicit Stream(const ShapedAttentionBackward& p)
      : p(p), head(p), row_bytes(p.width * kBytes<T>), warps(threads() / 32), all(tiles_of(head.length)),
        owned(shared_memory()), slots(owned + 2 * warps * kRows * row_bytes),
        lse(reinterpret_cast<float*>(slots + 4 * kRows * row_bytes)),
        delta(lse + tiles_of(p.length) * kRows), mean(delta + tiles_of(p.length) * kRows) {}

  SIMPLCLIP_DEVICE float* sums() const { return mean + tiles_of(p.length) * kRows; }

  SIMPLCLIP_DEVICE Tile own(int which) const { return Tile(owned + which * warps * kRows * row_bytes, row_bytes); }

  SIMPLCLIP_DEVICE Tile passing(int tile, int which) const {
    return Tile(slots + (tile % 2 * 2 + which) * kRows * row_bytes, row_bytes);
  }

  // Call after the barrier that ends a stream, and before the next stream.
  SIMPLCLIP_DEVICE void load_own(const HeadsView& left, const HeadsView& right, int first) const {
    stage(own(0), head.rows(left), 0, first * kRows, warps * kRows, head.length);
    stage(own(1), head.rows(right), 0, first * kRows, warps * kRows, head.length);
  }

  // Streams tiles begin to end - 1 of two matrices, one after the other; calls f(tile) for each.
  template <class F>
  SIMPLCLIP_DEVICE void stream(const HeadsView& left, const HeadsView& right, int begin, int end, F&& f) const {
    auto load = [&](int tile) {
      if (tile < end) {
        stage(passing(tile, 0), head.rows(left), 0, tile * kRows, kRows, head.length);
        stage(passing(tile, 1), head.rows(right), 0, tile * kRows, kRows, head.length);
      }
      cp_async_commit();
    };
    load(begin);
    load(begin + 1);
    for (int tile = begin; tile < end; ++tile) {
      cp_async_wait<1>();
      sync_block();
      f(tile);
      sync_block();
      load(tile + 2);
    }
  }

  // Adds the contribution of a streamed tile to the warp's own tile, which has the rows; the other has the columns. A sweep
  // for delta uses `delta_parts` alone, one for dq `first`, one for dk and dv both sums.
  template <Sweep kSweep>
  SIMPLCLIP_DEVICE void add(
      int own_tile, int tile, float (&first)[kWidth / kRows][2][4], float (&second)[kWidth / kRows][2][4],
      float (&delta_parts)[2]) {
    constexpr bool kKeys = kSweep == Sweep::kKeys;
    if (p.causal && (kKeys ? tile < own_tile : tile > own_tile)) return;
    float s[1][2][4] = {}, dp[1][2][4] = {};
    multiply_rows<T, 1>(s, own(0), warp(), 0, passing(tile, 0), 1, row_bytes);
    multiply_rows<T, 1>(dp, own(1), warp(), 0, passing(tile, 1), 1, row_bytes);
    const float scale = p.scale * kLog2E;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int low = i / 2 % 2, row = own_tile * kRows + lane() / 4 + 8 * low;
      const int column = tile * kRows + i / 4 * 8 + lane() % 4 * 2 + i % 2;
      const int query = kKeys ? column : row, key = kKeys ? row : column;
      const bool visible = key < (p.causal ? query + 1 : head.length);
      float &x = s[0][i / 4][i % 4], &y = dp[0][i / 4][i % 4];
      const float probability = visible ? fast_exp2(x * scale - lse[query]) : 0;
      const float average = visible ? mean[query] : 0;
      if constexpr (kSweep == Sweep::kDelta) {
        delta_parts[low] += probability * y;
        gains.gamma -= average * y;
        if (query == key) gains.alpha += y;
      } else {
        y = head.beta * probability * (y - delta[query]);
        x = head.beta * probability - head.gamma * average;
      }
    }
    if constexpr (kSweep != Sweep::kDelta) {
      const Operand<T> ds = pack<T>(dp[0]), joined = pack<T>(s[0]);
#pragma unroll
      for (int i = 0; i < kWidth / kRows; ++i) {
        if (i * kRows < p.width) {
          multiply_columns<T>(first[i], ds, passing(tile, 0), 0, i);
          if constexpr (kKeys) multiply_columns<T>(second[i], joined, passing(tile, 1), 0, i);
        }
      }
    }
  }

  SIMPLCLIP_DEVICE void queries(int first) {
    const int tile = first + warp(), end = p.causal ? smaller(all, first + warps) : all;
    float sum[kWidth / kRows][2][4] = {}, parts[2] = {};
    load_own(p.q, p.grad, first);
    stream(p.k, p.v, 0, end, [&](int key) {
      if (tile < all) add<Sweep::kDelta>(tile, key, sum, sum, parts);
    });
#pragma unroll
    for (int low = 0; low < 2; ++low) {
      gains.beta += parts[low];
      const float whole = row_sum(parts[low]);
      if (tile < all && lane() % 4 == 0) delta[tile * kRows + lane() / 4 + 8 * low] = whole;
    }
    stream(p.k, p.v, 0, end, [&](int key) {
      if (tile < all) add<Sweep::kQueries>(tile, key, sum, sum, parts);
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
    stream(p.q, p.grad, p.causal ? first : 0, all, [&](int query) {
      if (tile < all) add<Sweep::kKeys>(tile, query, sum, other, unused);
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
__global__ void __launch_bounds__(kThreads, kBlocks)
    shaped_attention_stream_kernel(const __grid_constant__ ShapedAttentionBackward p) {
  Stream<T, kWidth>(p).run();
}

}  // namespace simplclip::gpu
