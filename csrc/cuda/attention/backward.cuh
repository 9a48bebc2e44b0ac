// shaped_attention, backward in one launch: dP = dO V^T, delta_i = sum_j A_ij dP_ij, dS = beta A (dP - delta),
// dq = scale dS k, dk = scale dS^T q, dv = alpha dO + (beta A - gamma C)^T dO. A head fits in shared memory.
#pragma once

#include "attention.cuh"

namespace simplclip::gpu {

// A thread's part of the gradients of alpha, beta and gamma.
struct GainSums {
  float alpha = 0, beta = 0, gamma = 0;

  // Writes the block's sums, added in the order of its warps. `shared` holds 3 floats for each warp. All threads must call this.
  SIMPLCLIP_DEVICE void store(float* shared, const ShapedAttentionBackward& p, const Head& head) const {
    const float sums[3] = {warp_sum(alpha), warp_sum(beta), warp_sum(gamma)};
    if (lane() == 0) {
      for (int i = 0; i < 3; ++i) shared[warp() * 3 + i] = sums[i];
    }
    sync_block();
    if (thread() < 3) {
      float sum = 0;
      for (int i = 0; i < threads() / 32; ++i) sum += shared[i * 3 + thread()];
      p.d_gains[(int64_t(head.batch) * 3 + thread()) * p.heads + head.index] = sum;
    }
  }
};

// A block has one warp for each tile of 16 tokens. First a warp serves 16 queries: from their rows of A and dP in registers it
// computes dS, beta A - gamma C and dq. Both matrices then replace keys and values in shared memory. Next the warp serves 16
// keys: from both matrices it computes dk and dv. Shared memory holds q, dO; k, v, later the two matrices; sums.
template <class T, int kBlocks>
__global__ void __launch_bounds__(kShapedThreads, kBlocks)
    shaped_attention_backward_kernel(const __grid_constant__ ShapedAttentionBackward p) {
  constexpr int kTiles = kShapedTiles;
  const Head head(p);
  const HeadRows dq = head.rows(p.dq), dk = head.rows(p.dk), dv = head.rows(p.dv);
  const int tile = warp(), all = tiles_of(head.length), rows = tiles_of(p.length) * kRows;
  const int tiles = tile < all ? (p.causal ? tile + 1 : all) : 0;
  const int row_bytes = p.width * kBytes<T>, columns = p.width / kRows;

  char* const shared = shared_memory();
  const Tile q(shared, row_bytes), grad(shared + rows * row_bytes, row_bytes);
  char* const second = shared + 2 * rows * row_bytes;
  const Tile k(second, row_bytes), v(second + rows * row_bytes, row_bytes);
  const Tile ds(second, rows * kBytes<T>), joined(second + rows * rows * kBytes<T>, rows * kBytes<T>);
  const int exchange = rows > p.width ? rows : p.width;
  float* const sums = reinterpret_cast<float*>(second + 2 * rows * exchange * kBytes<T>);

  stage(q, head.rows(p.q), 0, 0, all * kRows, head.length);
  stage(k, head.rows(p.k), 0, 0, all * kRows, head.length);
  cp_async_commit();
  stage(grad, head.rows(p.grad), 0, 0, all * kRows, head.length);
  stage(v, head.rows(p.v), 0, 0, all * kRows, head.length);
  cp_async_commit();

  float a[kTiles][2][4] = {}, dp[kTiles][2][4] = {};
  cp_async_wait<1>();
  sync_block();
  multiply_rows<T, kTiles>(a, q, tile, 0, k, tiles, row_bytes);
  cp_async_wait<0>();
  sync_block();
  multiply_rows<T, kTiles>(dp, grad, tile, 0, v, tiles, row_bytes);

  GainSums gains;
  Operand<T> left_ds[kTiles], left_joined[kTiles];
  float delta[2], mean[2];
#pragma unroll
  for (int low = 0; low < 2; ++low) {
    const int row = tile * kRows + lane() / 4 + 8 * low, visible = p.causal ? row + 1 : head.length;
    const float lse = row < head.length ? head.lse(p)[row] : 0;
    float sum = 0, total = 0;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (i < tiles) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int column = i * kRows + j / 2 * 8 + lane() % 4 * 2 + j % 2;
          float& x = a[i][j / 2][2 * low + j % 2];
          const float y = dp[i][j / 2][2 * low + j % 2];
          const bool hidden = i == tiles - 1 && column >= visible;
          x = hidden ? 0 : fast_exp(scaled(x, p.scale) - lse);
          sum += x * y;
          total += hidden ? 0 : y;
          if (column == row) gains.alpha += y;
        }
      }
    }
    mean[low] = 1.0f / visible;
    gains.beta += sum;
    if (tiles > 0) gains.gamma -= total * mean[low];
    delta[low] = row_sum(sum);
  }
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    if (i < tiles) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int low = j / 2 % 2, row = tile * kRows + lane() / 4 + 8 * low, visible = p.causal ? row + 1 : head.length;
        const bool hidden = i == tiles - 1 && i * kRows + j / 4 * 8 + lane() % 4 * 2 + j % 2 >= visible;
        float &x = a[i][j / 4][j % 4], &y = dp[i][j / 4][j % 4];
        x *= head.beta;
        y = x * (y - delta[low]);
        x -= hidden ? 0 : head.gamma * mean[low];
      }
      left_joined[i] = pack<T>(a[i]);
      left_ds[i] = pack<T>(dp[i]);
    }
  }
  for (int i = 0; i < columns; ++i) {
    float sum[2][4] = {};
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (j < tiles) multiply_columns<T>(sum, left_ds[j], k, j, i);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[j / 4][j % 4] *= p.scale;
    store_global<T>(sum, dq, tile, i, head.length, p.length);
  }

  sync_block();  // keys and values are not read any more
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    if (i < tiles) {
      store_operand<T>(ds, tile, i, left_ds[i]);
      store_operand<T>(joined, tile, i, left_joined[i]);
    }
  }
  gains.store(sums, p, head);  // includes a barrier, after which both matrices are complete

  const int first = p.causal ? tile : 0;  // the first tile of queries that attends to the warp's keys
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    if (first <= i && i < all && tile < all) {
      left_ds[i] = load_transposed<T>(ds, i, tile);
      left_joined[i] = load_transposed<T>(joined, i, tile);
    }
  }
  for (int i = 0; i < columns; ++i) {
    float sum[2][2][4] = {}, own[2][4];
    load_global<T>(own, head.rows(p.grad), tile, i, head.length);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (first <= j && j < all && tile < all) {
        multiply_columns<T>(sum[0], left_ds[j], q, j, i);
        multiply_columns<T>(sum[1], left_joined[j], grad, j, i);
      }
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      sum[0][j / 4][j % 4] *= p.scale;
      sum[1][j / 4][j % 4] += head.alpha * own[j / 4][j % 4];
    }
    store_global<T>(sum[0], dk, tile, i, head.length, p.length);
    store_global<T>(sum[1], dv, tile, i, head.length, p.length);
  }
}

}  // namespace simplclip::gpu
