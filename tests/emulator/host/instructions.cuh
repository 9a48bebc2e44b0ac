// Replaces csrc/cuda/instructions.cuh under the emulator. `site` is the caller's source location, for messages.
#pragma once

#include "emulator.h"

#include <cmath>

#define SIMPLCLIP_DEVICE inline
#define __global__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace simplclip::gpu {

using emulator::Site;
using dim3 = emulator::Dim3;

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};

// The stream's address is the seed.
template <class... P>
const char* launch_kernel(
    void (*kernel)(P...), dim3 grid, int threads, int shared, void* stream, const std::type_identity_t<P>&... p) {
  emulator::launch(grid, threads, shared, reinterpret_cast<uint64_t>(stream), [&] { kernel(p...); });
  return nullptr;
}

inline int thread() { return emulator::engine.running->index; }
inline int threads() { return emulator::engine.threads; }
inline int block_x() { return emulator::engine.block.x; }
inline int lane() { return thread() & 31; }
inline int warp() { return thread() >> 5; }
inline char* shared_memory() { return emulator::engine.shared; }

inline void sync_block(Site site = Site::current()) { emulator::sync_block(site); }

template <class V>
V shuffle_xor(V value, int mask, Site site = Site::current()) {
  return emulator::shuffle_xor(site, value, mask);
}

template <class T>
float widen(uint32_t bits) {
  if constexpr (std::is_same_v<T, bf16>) return std::bit_cast<float>(bits << 16);
  return std::bit_cast<_Float16>(static_cast<uint16_t>(bits));
}

template <class T>
uint32_t narrow(float value) {
  if constexpr (std::is_same_v<T, bf16>) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    return value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
  return std::bit_cast<uint16_t>(static_cast<_Float16>(value));
}

inline float as_float(uint32_t bits) { return std::bit_cast<float>(bits); }

template <class T>
uint32_t pack2(float low, float high) {
  return narrow<T>(low) | narrow<T>(high) << 16;
}

template <class T>
float2 unpack2(uint32_t packed) {
  return {widen<T>(packed & 0xffff), widen<T>(packed >> 16)};
}

inline uint32_t to_tf32(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return std::isfinite(value) ? (bits + 0x1000) & 0xffffe000u : bits;
}

inline float fast_exp2(float value) { return std::exp2(value); }

struct Fragments {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

typedef float Row8 __attribute__((vector_size(32)));

// d += a b of the fragments of all lanes, for registers of kPer elements; F()(bits, i) is element i.
template <int kPer, class F>
void mma(const char* name, Site site, Fragments mine, F) {
  emulator::warp_collective(name, site, mine, [](Fragments* const (&lanes)[32]) {
    const F value;
    float left[16][8 * kPer];
    Row8 right[8 * kPer];
    for (int lane = 0; lane < 32; ++lane) {
      for (int j = 0; j < kPer; ++j) {
        const int group = lane / 4, at = lane % 4 * kPer + j;
        for (int i = 0; i < 4; ++i) left[group + i % 2 * 8][at + i / 2 * 4 * kPer] = value(lanes[lane]->a[i], j);
        for (int i = 0; i < 2; ++i) right[at + i * 4 * kPer][group] = value(lanes[lane]->b[i], j);
      }
    }
    for (int row = 0; row < 16; ++row) {
      Row8 sum{};
      for (int k = 0; k < 8 * kPer; ++k) sum += left[row][k] * right[k];
      for (int column = 0; column < 8; ++column) lanes[row % 8 * 4 + column / 2]->d[row / 8 * 2 + column % 2] += sum[column];
    }
  });
}

template <class T>
void mma16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::current()) {
  mma<2>("mma16816", site, {d, a, b}, [](uint32_t bits, int i) { return widen<T>(bits >> i * 16 & 0xffff); });
}

inline void mma1688_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::current()) {
  mma<1>("mma1688_tf32", site, {d, a, b}, [](uint32_t bits, int) { return as_float(bits & 0xffffe000u); });
}

// A lane's row is read when the lane arrives: other lanes' later writes are seen only after a barrier.
template <bool TRANSPOSED>
void ldmatrix(const char* name, Site site, uint32_t (&r)[4], const void* row) {
  struct Operands {
    uint32_t* r;
    const void* from;
    uint16_t row[8];
  } mine{r, row, {}};
  emulator::check_shared(name, site, row, 16);
  std::memcpy(mine.row, row, 16);
  emulator::warp_collective(name, site, mine, [](Operands* const (&lanes)[32]) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const void* rows[8];
      for (int i = 0; i < 8; ++i) rows[i] = lanes[8 * matrix + i]->from;
      emulator::count_replays(rows);
    }
    for (int i = 0; i < 128; ++i) {
      const int matrix = i / 32, lane = i % 32, group = lane / 4, pair = lane % 4 * 2;
      auto at = [&](int row, int column) -> uint32_t { return lanes[8 * matrix + row]->row[column]; };
      lanes[lane]->r[matrix] = TRANSPOSED ? at(pair, group) | at(pair + 1, group) << 16
                                          : at(group, pair) | at(group, pair + 1) << 16;
    }
  });
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, Site site = Site::current()) {
  ldmatrix<false>("ldmatrix_x4", site, r, row);
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, Site site = Site::current()) {
  ldmatrix<true>("ldmatrix_x4_trans", site, r, row);
}

inline void cp_async_16(void* shared, const void* global, bool valid, Site site = Site::current()) {
  emulator::cp_async("cp_async_16", site, shared, global, 16, valid);
}

using emulator::cp_async_commit;

template <int N>
void cp_async_wait() {
  emulator::cp_async_wait(N);
}

}  // namespace simplclip::gpu
