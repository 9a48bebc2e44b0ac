// Small kernels, each for one group of functions of instructions.cuh.
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

}  // namespace simplclip::gpu
