// The instructions that the kernels are written in, one function each: tensor-core products, ldmatrix, cp.async, shuffles,
// barriers, conversions. nvcc compiles them to PTX for sm_80 and later. With SIMPLCLIP_EMULATOR a host compiler takes the
// second body of each, so that a kernel's source runs unchanged, and is tested, on a machine without a GPU.
//
// Names of sections and tables are those of the PTX ISA. `site` is the caller's place for the emulator's messages.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef SIMPLCLIP_EMULATOR
#include "emulator.h"
#define SIMPLCLIP_DEVICE inline
#define SIMPLCLIP_KERNEL
#define __launch_bounds__(...)
#define __grid_constant__
#else
#include <cuda_runtime.h>
#define SIMPLCLIP_DEVICE __device__ __forceinline__
#define SIMPLCLIP_KERNEL __global__
#endif

namespace simplclip::gpu {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

#ifdef SIMPLCLIP_EMULATOR
using Site = emulator::Site;
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
#else
struct Site {
  static SIMPLCLIP_DEVICE constexpr Site current() { return {}; }
};
#endif

#ifdef SIMPLCLIP_EMULATOR
SIMPLCLIP_DEVICE int thread() { return emulator::engine.running->index; }
SIMPLCLIP_DEVICE int threads() { return emulator::engine.threads; }
SIMPLCLIP_DEVICE int block_x() { return emulator::engine.block.x; }
SIMPLCLIP_DEVICE int block_y() { return emulator::engine.block.y; }
SIMPLCLIP_DEVICE int block_z() { return emulator::engine.block.z; }
SIMPLCLIP_DEVICE int grid_x() { return emulator::engine.grid.x; }
SIMPLCLIP_DEVICE char* shared_memory() { return emulator::engine.shared; }
#else
SIMPLCLIP_DEVICE int thread() { return threadIdx.x; }
SIMPLCLIP_DEVICE int threads() { return blockDim.x; }
SIMPLCLIP_DEVICE int block_x() { return blockIdx.x; }
SIMPLCLIP_DEVICE int block_y() { return blockIdx.y; }
SIMPLCLIP_DEVICE int block_z() { return blockIdx.z; }
SIMPLCLIP_DEVICE int grid_x() { return gridDim.x; }
// The launch's dynamic shared memory; ldmatrix and cp.async need multiples of 16, a multiple of 128 keeps the banks in step.
SIMPLCLIP_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char simplclip_shared[];
  return simplclip_shared;
}
SIMPLCLIP_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif
SIMPLCLIP_DEVICE int lane() { return thread() & 31; }
SIMPLCLIP_DEVICE int warp() { return thread() >> 5; }

SIMPLCLIP_DEVICE void sync_block([[maybe_unused]] Site site = Site::current()) {
#ifdef SIMPLCLIP_EMULATOR
  emulator::sync_block(site);
#else
  __syncthreads();
#endif
}

SIMPLCLIP_DEVICE void sync_warp([[maybe_unused]] Site site = Site::current()) {
#ifdef SIMPLCLIP_EMULATOR
  emulator::sync_warp(site);
#else
  __syncwarp();
#endif
}

template <class V>  // float, int32_t or uint32_t
SIMPLCLIP_DEVICE V shuffle(V value, int from, [[maybe_unused]] Site site = Site::current()) {
#ifdef SIMPLCLIP_EMULATOR
  return emulator::shuffle("shuffle", site, value, from);
#else
  return __shfl_sync(0xffffffffu, value, from);
#endif
}

template <class V>
SIMPLCLIP_DEVICE V shuffle_xor(V value, int mask, [[maybe_unused]] Site site = Site::current()) {
#ifdef SIMPLCLIP_EMULATOR
  return emulator::shuffle("shuffle_xor", site, value, lane() ^ mask);
#else
  return __shfl_xor_sync(0xffffffffu, value, mask);
#endif
}

#ifdef SIMPLCLIP_EMULATOR
template <class T>
inline float widen(uint32_t bits) {
  if constexpr (std::is_same_v<T, bf16>) return std::bit_cast<float>(bits << 16);
  return std::bit_cast<_Float16>(static_cast<uint16_t>(bits));
}

template <class T>
inline uint32_t narrow(float value) {
  if constexpr (std::is_same_v<T, bf16>) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    return value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
  return std::bit_cast<uint16_t>(static_cast<_Float16>(value));
}
#endif

SIMPLCLIP_DEVICE float as_float(uint32_t bits) {
#ifdef SIMPLCLIP_EMULATOR
  return std::bit_cast<float>(bits);
#else
  return __uint_as_float(bits);
#endif
}

SIMPLCLIP_DEVICE uint32_t as_uint(float value) {
#ifdef SIMPLCLIP_EMULATOR
  return std::bit_cast<uint32_t>(value);
#else
  return __float_as_uint(value);
#endif
}

// Two floats, rounded to nearest even, in one register; `low` in the lower half.
template <class T>
SIMPLCLIP_DEVICE uint32_t pack2(float low, float high) {
#ifdef SIMPLCLIP_EMULATOR
  return narrow<T>(low) | narrow<T>(high) << 16;
#else
  uint32_t packed;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
#endif
}

template <class T>
SIMPLCLIP_DEVICE float2 unpack2(uint32_t packed) {
#ifdef SIMPLCLIP_EMULATOR
  return {widen<T>(packed & 0xffff), widen<T>(packed >> 16)};
#else
  float2 pair;
  if constexpr (std::is_same_v<T, bf16>) {
    pair.x = __uint_as_float(packed << 16);
    pair.y = __uint_as_float(packed & 0xffff0000u);
  } else {
    asm("{\n .reg .b16 low, high;\n mov.b32 {low, high}, %2;\n cvt.f32.f16 %0, low;\n cvt.f32.f16 %1, high;\n}"
        : "=f"(pair.x), "=f"(pair.y)
        : "r"(packed));
  }
  return pair;
#endif
}

// The nearest value with 10 bits of mantissa, ties away from zero.
SIMPLCLIP_DEVICE uint32_t to_tf32(float value) {
#ifdef SIMPLCLIP_EMULATOR
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return std::isfinite(value) ? (bits + 0x1000) & 0xffffe000u : bits;
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
#endif
}

// 2^value within 2 ulp; subnormal values and results count as zero.
SIMPLCLIP_DEVICE float fast_exp2(float value) {
#ifdef SIMPLCLIP_EMULATOR
  return std::exp2(value);
#else
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(value));
  return power;
#endif
}

#ifdef SIMPLCLIP_EMULATOR
struct Fragments {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

typedef float Row8 __attribute__((vector_size(32)));

// d += a b with a [16, K] and b [K, 8], once all lanes' fragments are spread out. The accumulators of both shapes are laid out
// alike: c0 and c1 in row `lane / 4`, c2 and c3 eight rows below, columns 2 (lane % 4) and the next.
template <int K>
inline void multiply(Fragments* const (&lanes)[32], const float (&a)[16][K], const Row8 (&b)[K]) {
  for (int row = 0; row < 16; ++row) {
    Row8 sum{};
    for (int k = 0; k < K; ++k) sum += a[row][k] * b[k];
    for (int column = 0; column < 8; ++column) lanes[row % 8 * 4 + column / 2]->d[row / 8 * 2 + column % 2] += sum[column];
  }
}
#endif

// d += a b: a [16, 16] row-major, b [16, 8] column-major, T = bf16 or f16, sums in float32.
// Layout: "Matrix Fragments for mma.m16n8k16 with floating point type". With group = lane / 4 and pair = 2 (lane % 4):
//   a[0] row group, a[1] row group + 8, columns pair and pair + 1; a[2] and a[3] the same, eight columns on
//   b[0] rows pair and pair + 1, b[1] eight rows on; column group
//   d[0], d[1] row group, d[2], d[3] row group + 8; columns pair and pair + 1
template <class T>
SIMPLCLIP_DEVICE void mma16816(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], [[maybe_unused]] Site site = Site::current()) {
#ifdef SIMPLCLIP_EMULATOR
  Fragments mine{d, a, b};
  emulator::warp_collective("mma16816", site, mine, [](Fragments* const (&lanes)[32]) {
    float left[16][16];
    Row8 right[16];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, pair = lane % 4 * 2;
      for (int i = 0; i < 8; ++i) {
        const uint32_t bits = lanes[lane]->a[i / 2] >> i % 2 * 16 & 0xffff;
        left[group + (i / 2 % 2 ? 8 : 0)][pair + i % 2 + (i < 4 ? 0 : 8)] = widen<T>(bits);
      }
      for (int i = 0; i < 4; ++i) {
        right[pair + i % 2 + (i < 2 ? 0 : 8)][group] = widen<T>(lanes[lane]->b[i / 2] >> i % 2 * 16 & 0xffff);
      }
    }
    multiply(lanes, left, right);
  });
#else
  if constexpr (std::is_same_v<T, bf16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// d += a b in TF32: a [16, 8] row-major, b [8, 8] column-major, sums in float32; the operands' low 13 bits are ignored.
// Layout: "Matrix Fragments for mma.m16n8k8", .tf32. With group = lane / 4 and k = lane % 4:
//   a[0] row group, a[1] row group + 8, column k; a[2] and a[3] the same, four columns on
//   b[0] row k, b[1] row k + 4; column group; d as in mma16816
SIMPLCLIP_DEVICE void mma1688_tf32(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], [[maybe_unused]] Site site = Site::current()) {
#ifdef SIMPLCLIP_EMULATOR
  Fragments mine{d, a, b};
  emulator::warp_collective("mma1688_tf32", site, mine, [](Fragments* const (&lanes)[32]) {
    auto value = [](uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); };
    float left[16][8];
    Row8 right[8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, k = lane % 4;
      for (int i = 0; i < 4; ++i) left[group + i % 2 * 8][k + i / 2 * 4] = value(lanes[lane]->a[i]);
      for (int i = 0; i < 2; ++i) right[k + i * 4][group] = value(lanes[lane]->b[i]);
    }
    multiply(lanes, left, right);
  });
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

#ifdef SIMPLCLIP_EMULATOR
// A lane's row is read when the lane arrives: what another lane writes later, with no sync_warp between, is not in it.
template <int N, bool TRANSPOSED>
inline void load_matrices(const char* name, Site site, uint32_t (&r)[N], const void* row) {
  struct Operands {
    uint32_t* r;
    uint16_t row[8];
  } mine{r, {}};
  if (lane() < 8 * N) {
    emulator::check_shared(name, site, row, 16);
    std::memcpy(mine.row, row, 16);
  }
  emulator::warp_collective(name, site, mine, [](Operands* const (&lanes)[32]) {
    for (int i = 0; i < 32 * N; ++i) {
      const int matrix = i / 32, lane = i % 32, group = lane / 4, pair = lane % 4 * 2;
      auto at = [&](int row, int column) -> uint32_t { return lanes[8 * matrix + row]->row[column]; };
      lanes[lane]->r[matrix] = TRANSPOSED ? at(pair, group) | at(pair + 1, group) << 16
                                          : at(group, pair) | at(group, pair + 1) << 16;
    }
  });
}
#endif

// 8x8 matrices of 16-bit elements. Lanes 8 i to 8 i + 7 pass the addresses of matrix i's rows: 16 bytes of shared memory each,
// 16-byte aligned. r[i] receives row lane / 4, columns 2 (lane % 4) and the next, of matrix i ("Warp-level matrix load
// instruction: ldmatrix"), that is an operand of mma16816; _trans: rows 2 (lane % 4) and the next, column lane / 4.
SIMPLCLIP_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row, [[maybe_unused]] Site site = Site::current()) {
#ifdef SIMPLCLIP_EMULATOR
  load_matrices<4, false>("ldmatrix_x4", site, r, row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

SIMPLCLIP_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row, [[maybe_unused]] Site site = Site::current()) {
#ifdef SIMPLCLIP_EMULATOR
  load_matrices<2, false>("ldmatrix_x2", site, r, row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
#endif
}

SIMPLCLIP_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, [[maybe_unused]] Site site = Site::current()) {
#ifdef SIMPLCLIP_EMULATOR
  load_matrices<4, true>("ldmatrix_x4_trans", site, r, row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

SIMPLCLIP_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, [[maybe_unused]] Site site = Site::current()) {
#ifdef SIMPLCLIP_EMULATOR
  load_matrices<2, true>("ldmatrix_x2_trans", site, r, row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// Copies 16, 8 or 4 bytes, aligned to as many, to shared memory in the background; zeros if not `valid`, and `global` is not
// read then. Seen by this thread after the wait for its group, by others after a barrier behind that.
SIMPLCLIP_DEVICE void cp_async_16(
    void* shared, const void* global, bool valid, [[maybe_unused]] Site site = Site::current()) {
#ifdef SIMPLCLIP_EMULATOR
  emulator::cp_async("cp_async_16", site, shared, global, 16, valid);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
#endif
}

SIMPLCLIP_DEVICE void cp_async_8(
    void* shared, const void* global, bool valid, [[maybe_unused]] Site site = Site::current()) {
#ifdef SIMPLCLIP_EMULATOR
  emulator::cp_async("cp_async_8", site, shared, global, 8, valid);
#else
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;"
               :
               : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(valid ? 8 : 0)
               : "memory");
#endif
}

SIMPLCLIP_DEVICE void cp_async_4(
    void* shared, const void* global, bool valid, [[maybe_unused]] Site site = Site::current()) {
#ifdef SIMPLCLIP_EMULATOR
  emulator::cp_async("cp_async_4", site, shared, global, 4, valid);
#else
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
               :
               : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(valid ? 4 : 0)
               : "memory");
#endif
}

// Closes the group of this thread's copies since the last one.
SIMPLCLIP_DEVICE void cp_async_commit() {
#ifdef SIMPLCLIP_EMULATOR
  emulator::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" : : : "memory");
#endif
}

// Waits until at most the last N groups of this thread are under way.
template <int N>
SIMPLCLIP_DEVICE void cp_async_wait() {
#ifdef SIMPLCLIP_EMULATOR
  emulator::cp_async_wait(N);
#else
  asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory");
#endif
}

}  // namespace simplclip::gpu
