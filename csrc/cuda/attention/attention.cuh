// shaped_attention, forward: out = alpha v + (beta A - gamma C) v for each head, A = softmax(scale q k^T), C the mean over
// the visible keys. A warp has 16 queries and keeps their whole rows of logits, so that the softmax needs no rescaling and A and
// C are combined before rounding: if they nearly cancel, the difference is rounded, not its terms.
#pragma once

#include "plan.h"
#include "../tile.cuh"

namespace simplclip::gpu {

// The block's sequence and head, and the gains.
struct Head {
  int batch, index, length;
  float alpha, beta, gamma;

  SIMPLCLIP_DEVICE explicit Head(const ShapedAttention& p)
      : batch(block_x() / p.heads), index(block_x() % p.heads),
        length(p.lengths ? between(0, p.lengths[batch], p.length) : p.length),
        alpha(p.gains[index]), beta(p.gains[p.heads + index]), gamma(p.gains[2 * p.heads + index]) {}

  // [L]
  SIMPLCLIP_DEVICE float* lse(const ShapedAttention& p) const {
    return p.lse + (int64_t(batch) * p.heads + index) * p.length;
  }
  SIMPLCLIP_DEVICE HeadRows rows(const HeadsView& t) const { return {t.data + batch * t.batch + index * t.head, t.row}; }
};

// A block has one warp for each tile of 16 tokens. Shared memory holds the queries, and two slots for slices: some columns of all
// keys, later of all values. The next slice loads while the current one is in use.
template <class T, int kBlocks>
__global__ void __launch_bounds__(kShapedThreads, kBlocks)
    shaped_attention_forward_kernel(const __grid_constant__ ShapedAttentionForward p) {
  const Head head(p);
  const HeadRows q = head.rows(p.q), k = head.rows(p.k), v = head.rows(p.v), out = head.rows(p.out);
  constexpr int kTiles = kShapedTiles;
  const int tile = warp(), all = tiles_of(head.length), rows = tiles_of(p.length) * kRows;
  const int row_bytes = p.width * kBytes<T>, slices = (row_bytes + p.slice - 1) / p.slice;
  const int tiles = tile < all ? (p.causal ? tile + 1 : all) : 0;  // tiles of keys that the warp's queries see

  char* const shared = shared_memory();
  const Tile queries(shared, row_bytes);
  auto slot = [&](int stage) {  // stages 0 to slices - 1 are the slices of the keys, the others those of the values
    const int width = smaller(p.slice, row_bytes - stage % slices * p.slice);
    return Tile(shared + rows * row_bytes + stage % 2 * rows * p.slice, width);
  };
  auto load = [&](int s) {
    if (s < slices) {
      stage(slot(s), k, s * p.slice, 0, all * kRows, head.length);
    } else if (s < 2 * slices) {
      stage(slot(s), v, (s - slices) * p.slice, 0, all * kRows, head.length);
    }
    cp_async_commit();
  };
  auto refill = [&](int s) {  // loads stage s + 2 into the slot of stage s
    if (s + 2 < 2 * slices) sync_block();
    load(s + 2);
  };
  stage(queries, q, 0, 0, rows, head.length);
  load(0);
  load(1);

  float c[kTiles][2][4];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) c[i][j / 4][j % 4] = 0;
  }
  for (int s = 0; s < slices; ++s) {
    cp_async_wait<1>();
    sync_block();
    const Tile keys = slot(s);
    multiply_rows<T, kTiles>(c, queries, warp(), s * p.slice / kChunk, keys, tiles, keys.stride);
    refill(s);
  }

  Operand<T> weights[kTiles];
  float mean[2], inverse[2], top[2];
#pragma unroll
  for (int low = 0; low < 2; ++low) {
    const int row = tile * kRows + lane() / 4 + 8 * low, visible = p.causal ? row + 1 : head.length;
    float most = -INFINITY;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (i < tiles) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float& x = c[i][j / 2][2 * low + j % 2];
          x = scaled(x, p.scale);
          if (i == tiles - 1 && i * kRows + j / 2 * 8 + lane() % 4 * 2 + j % 2 >= visible) x = -INFINITY;
          most = fmaxf(most, x);
        }
      }
    }
    top[low] = row_max(most);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (i < tiles) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float& x = c[i][j / 2][2 * low + j % 2];
          x = fast_exp(x - top[low]);
          sum += x;
        }
      }
    }
    sum = row_sum(sum);
    inverse[low] = head.beta / sum;
    mean[low] = head.gamma / visible;
    if (lane() % 4 == 0 && row < p.length) head.lse(p)[row] = row < head.length ? top[low] + logf(sum) : 0;
  }
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    if (i < tiles) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int low = j / 2 % 2, row = tile * kRows + lane() / 4 + 8 * low, visible = p.causal ? row + 1 : head.length;
        float& x = c[i][j / 4][j % 4];
        const bool hidden = i == tiles - 1 && i * kRows + j / 4 * 8 + lane() % 4 * 2 + j % 2 >= visible;
        x = hidden ? 0 : x * inverse[low] - mean[low];
      }
      weights[i] = pack<T>(c[i]);
    }
  }

  for (int s = slices; s < 2 * slices; ++s) {
    cp_async_wait<1>();
    sync_block();
    const Tile values = slot(s);
    const int column = (s - slices) * p.slice / (kRows * kBytes<T>);
    for (int i = 0; i < values.stride / (kRows * kBytes<T>); ++i) {
      float own[2][4], sum[2][4] = {};
      load_global<T>(own, v, tile, column + i, head.length);
      Tile below = values;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (j < tiles) multiply_columns<T>(sum, weights[j], below, 0, i);
        below.descend();
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[j / 4][j % 4] += head.alpha * own[j / 4][j % 4];
      store_global<T>(sum, out, tile, column + i, head.length, p.length);
    }
    refill(s);
  }
}

}  // namespace simplclip::gpu
