// The primitives of all CUDA kernels here: indices, barriers, shuffles, conversions. nvcc compiles them to PTX for sm_80 and
// later. With SIMPLCLIP_EMULATOR a host compiler uses the other body of each function, so that the kernels can be tested
// unchanged on a machine without a GPU.
//
// `site` is the caller's source location, for the emulator's messages.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

// SIMPLCLIP_ON(device, emulated): the one that is compiled.
#ifdef SIMPLCLIP_EMULATOR
#include "emulator.h"
#define SIMPLCLIP_DEVICE inline
#define SIMPLCLIP_KERNEL inline
#define SIMPLCLIP_ON(device, emulated) emulated
#define __launch_bounds__(...)
#define __grid_constant__
#else
#include <cuda_runtime.h>
#define SIMPLCLIP_DEVICE __device__ __forceinline__
#define SIMPLCLIP_KERNEL __global__
#define SIMPLCLIP_ON(device, emulated) device
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
struct alignas(8) uint2 {
  uint32_t x, y;
};
#else
struct Site {
  static SIMPLCLIP_DEVICE constexpr Site current() { return {}; }
};
#endif

SIMPLCLIP_DEVICE int thread() { return SIMPLCLIP_ON(threadIdx.x, emulator::engine.running->index); }
SIMPLCLIP_DEVICE int threads() { return SIMPLCLIP_ON(blockDim.x, emulator::engine.threads); }
SIMPLCLIP_DEVICE int block_x() { return SIMPLCLIP_ON(blockIdx.x, emulator::engine.block.x); }
SIMPLCLIP_DEVICE int block_y() { return SIMPLCLIP_ON(blockIdx.y, emulator::engine.block.y); }
SIMPLCLIP_DEVICE int grid_x() { return SIMPLCLIP_ON(gridDim.x, emulator::engine.grid.x); }
SIMPLCLIP_DEVICE int lane() { return thread() & 31; }
SIMPLCLIP_DEVICE int warp() { return thread() >> 5; }

// The launch's dynamic shared memory; ldmatrix and cp.async need multiples of 16, a multiple of 128 keeps the banks in step.
SIMPLCLIP_DEVICE char* shared_memory() {
#ifdef SIMPLCLIP_EMULATOR
  return emulator::engine.shared;
#else
  extern __shared__ __align__(128) char simplclip_shared[];
  return simplclip_shared;
#endif
}

#ifndef SIMPLCLIP_EMULATOR
SIMPLCLIP_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

SIMPLCLIP_DEVICE void sync_block([[maybe_unused]] Site site = Site::current()) {
  SIMPLCLIP_ON(__syncthreads(), emulator::sync_block(site));
}

SIMPLCLIP_DEVICE void sync_warp([[maybe_unused]] Site site = Site::current()) {
  SIMPLCLIP_ON(__syncwarp(), emulator::sync_warp(site));
}

template <class V>  // float, int32_t or uint32_t
SIMPLCLIP_DEVICE V shuffle(V value, int from, [[maybe_unused]] Site site = Site::current()) {
  return SIMPLCLIP_ON(__shfl_sync(0xffffffffu, value, from), emulator::shuffle("shuffle", site, value, from));
}

template <class V>
SIMPLCLIP_DEVICE V shuffle_xor(V value, int mask, [[maybe_unused]] Site site = Site::current()) {
  return SIMPLCLIP_ON(__shfl_xor_sync(0xffffffffu, value, mask),
                      emulator::shuffle("shuffle_xor", site, value, lane() ^ mask));
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

SIMPLCLIP_DEVICE float as_float(uint32_t bits) { return SIMPLCLIP_ON(__uint_as_float(bits), std::bit_cast<float>(bits)); }

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
  uint32_t bits = __builtin_bit_cast(uint32_t, value);
  SIMPLCLIP_ON(asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value)),
               bits = std::isfinite(value) ? (bits + 0x1000) & 0xffffe000u : bits);
  return bits;
}

// 2^value within 2 ulp; subnormal values and results are treated as zero.
SIMPLCLIP_DEVICE float fast_exp2(float value) {
  float power;
  SIMPLCLIP_ON(asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(value)), power = std::exp2(value));
  return power;
}

}  // namespace simplclip::gpu
