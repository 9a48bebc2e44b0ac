// Small kernels that between them call every function of instructions.cuh.
#pragma once

#include "instructions.cuh"

namespace simplclip::gpu {

// One warp: d += a b of each lane's registers. T = bf16, f16, or float for TF32.
template <class T>
__global__ void mma_kernel(const uint32_t* a /* [32, 4] */, const uint32_t* b /* [32, 2] */, float* d /* [32, 4] */) {
  uint32_t left[4], right[2];
  float sums[4];
  for (int i = 0; i < 4; ++i) left[i] = a[lane() * 4 + i];
  for (int i = 0; i < 2; ++i) right[i] = b[lane() * 2 + i];
  for (int i = 0; i < 4; ++i) sums[i] = d[lane() * 4 + i];
  if constexpr (std::is_same_v<T, float>) {
    mma1688_tf32(sums, left, right);
  } else {
    mma16816<T>(sums, left, right);
  }
  for (int i = 0; i < 4; ++i) d[lane() * 4 + i] = sums[i];
}

// One warp, 1 KiB of shared memory: what each lane receives of the rows at the lanes' offsets.
__global__ void ldmatrix_kernel(
    const char* memory /* 1 KiB */, const int* offsets /* [32] */, bool transposed, uint32_t* out /* [32, 4] */) {
  char* shared = shared_memory();
  for (int i = lane() * 16; i < 1024; i += 512) cp_async_16(shared + i, memory + i, true);
  cp_async_commit();
  cp_async_wait<0>();
  sync_block();  // the rows have been copied
  const char* row = shared + offsets[lane()];
  uint32_t r[4];
  if (transposed) {
    ldmatrix_x4_trans(r, row);
  } else {
    ldmatrix_x4(r, row);
  }
  for (int i = 0; i < 4; ++i) out[lane() * 4 + i] = r[i];
}

// One warp: every lane copies BYTES of `from`, the last lanes zeros; `early` is what it reads before the second group's wait.
__global__ void cp_async_kernel(const char* from /* [2, 32, BYTES] */, int valid, uint32_t* early, uint32_t* late) {
  constexpr int BYTES = 16;
  char* shared = shared_memory() + lane() * BYTES;
  for (int i = 0; i < BYTES / 4; ++i) reinterpret_cast<uint32_t*>(shared + 32 * BYTES)[i] = 0;  // what a copy replaces
  for (int group = 0; group < 2; ++group) {
    void* to = shared + group * 32 * BYTES;
    const char* source = from + (group * 32 + lane()) * BYTES;
    cp_async_16(to, source, lane() < valid);
    cp_async_commit();
  }
  auto copy = [&](uint32_t* out) {  // [2, 32, BYTES / 4]
    for (int group = 0; group < 2; ++group) {
      for (int i = 0; i < BYTES / 4; ++i) {
        const int at = group * 32 * BYTES / 4 + i;
        out[at + lane() * BYTES / 4] = reinterpret_cast<const uint32_t*>(shared)[at];
      }
    }
  };
  cp_async_wait<1>();
  copy(early);
  cp_async_wait<0>();
  copy(late);
}

// Rounds `pairs` of floats to T and back, rounds floats to TF32, and computes powers of two.
template <class T>
__global__ void convert_kernel(
    const float* in, int pairs, uint32_t* packed, float* back, uint32_t* tf32, float* power) {
  for (int i = thread(); i < pairs; i += threads()) {
    packed[i] = pack2<T>(in[2 * i], in[2 * i + 1]);
    const float2 pair = unpack2<T>(packed[i]);
    back[2 * i] = pair.x;
    back[2 * i + 1] = pair.y;
    for (int j = 2 * i; j < 2 * i + 2; ++j) {
      tf32[j] = to_tf32(in[j]);
      power[j] = fast_exp2(in[j]);
    }
  }
}

// softmax of rows: one row per block, a float of shared memory per warp.
__global__ void softmax_kernel(const float* in /* [rows, columns] */, float* out, int columns) {
  float* parts = reinterpret_cast<float*>(shared_memory());
  in += static_cast<int64_t>(block_x()) * columns;
  out += static_cast<int64_t>(block_x()) * columns;
  float most = -INFINITY;
  for (int i = thread(); i < columns; i += threads()) most = fmaxf(most, in[i]);
  for (int mask = 16; mask; mask /= 2) most = fmaxf(most, shuffle_xor(most, mask));
  if (lane() == 0) parts[warp()] = most;
  sync_block();
  most = parts[0];
  for (int i = 1; i < threads() / 32; ++i) most = fmaxf(most, parts[i]);
  sync_block();  // the maxima are read before sums overwrite them

  float sum = 0;
  for (int i = thread(); i < columns; i += threads()) sum += fast_exp2((in[i] - most) * 1.44269504f);
  for (int mask = 16; mask; mask /= 2) sum += shuffle_xor(sum, mask);
  if (lane() == 0) parts[warp()] = sum;
  sync_block();
  sum = 0;
  for (int i = 0; i < threads() / 32; ++i) sum += parts[i];
  for (int i = thread(); i < columns; i += threads()) out[i] = fast_exp2((in[i] - most) * 1.44269504f) / sum;
}

// c = a b, a tile of 16 x 8 per warp: a and b row-major, staged by cp.async in slices of 16 of the inner dimension.
template <class T>
__global__ void product_kernel(
    const T* a /* [16, inner] */, const T* b /* [inner, 8 * warps] */, float* c /* [16, 8 * warps] */, int inner) {
  const int columns = threads() / 32 * 8;
  T* left = reinterpret_cast<T*>(shared_memory());  // [16, 16]
  T* right = left + 256;                            // [16, columns]
  float sums[4] = {};
  for (int k = 0; k < inner; k += 16) {
    if (thread() < 32) cp_async_16(left + thread() * 8, a + thread() / 2 * inner + k + thread() % 2 * 8, true);
    for (int i = thread(); i < 2 * columns; i += threads()) {
      const int row = i * 8 / columns, column = i * 8 % columns;
      cp_async_16(right + row * columns + column, b + (k + row) * columns + column, true);
    }
    cp_async_commit();
    cp_async_wait<0>();
    sync_block();
    uint32_t x[4], y[4];
    ldmatrix_x4(x, left + lane() % 16 * 16 + lane() / 16 * 8);
    ldmatrix_x4_trans(y, right + lane() % 16 * columns + warp() * 8);  // twice the same two matrices
    mma16816<T>(sums, x, {y[0], y[1]});
    sync_block();  // the slices are read before the next ones overwrite them
  }
  float* tile = c + warp() * 8 + lane() % 4 * 2;
  for (int i = 0; i < 4; ++i) tile[(lane() / 4 + i / 2 * 8) * columns + i % 2] = sums[i];
}

}  // namespace simplclip::gpu
