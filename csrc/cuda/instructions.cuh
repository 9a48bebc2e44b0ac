// The instructions of all CUDA kernels here, for sm_80 and later: indices, barriers, shuffles, conversions, products of tensor
// cores, staging. Sections are named as in the PTX ISA.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#define SIMPLCLIP_DEVICE __device__ __forceinline__

namespace simplclip::gpu {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

SIMPLCLIP_DEVICE int thread() { return threadIdx.x; }
SIMPLCLIP_DEVICE int threads() { return blockDim.x; }
SIMPLCLIP_DEVICE int block_x() { return blockIdx.x; }
SIMPLCLIP_DEVICE int lane() { return thread() & 31; }
SIMPLCLIP_DEVICE int warp() { return thread() >> 5; }

// Returns the launch's dynamic shared memory. ldmatrix and cp.async need a multiple of 16; a multiple of 128 starts at bank 0.
SIMPLCLIP_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char simplclip_shared[];
  return simplclip_shared;
}

SIMPLCLIP_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

SIMPLCLIP_DEVICE void sync_block() { __syncthreads(); }

template <class V>  // float, int32_t or uint32_t
SIMPLCLIP_DEVICE V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

SIMPLCLIP_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }

// Two floats, rounded to nearest even, in one register; `low` in the lower half.
template <class T>
SIMPLCLIP_DEVICE uint32_t pack2(float low, float high) {
  uint32_t packed;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

template <class T>
SIMPLCLIP_DEVICE float2 unpack2(uint32_t packed) {
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
}

// The nearest value with 10 bits of mantissa, ties away from zero.
SIMPLCLIP_DEVICE uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// e^value as 2^(value log2(e)), the power within 2 ulp; subnormal values and results are treated as zero.
SIMPLCLIP_DEVICE float fast_exp(float value) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(value * 1.44269504f));
  return power;
}

// A logit, rounded: fused into the subtraction of a log-sum-exp of rounded logits, the product would leave its rounding error,
// of large logits one that is not small for an exponential.
SIMPLCLIP_DEVICE float scaled(float value, float scale) { return __fmul_rn(value, scale); }

#define SIMPLCLIP_MMA(shape_and_types)                                                                            \
  asm("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"      \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                            \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

// d += a b of a warp, sums in float32: a [16, K] row-major, b [K, 8] column-major. A register of a and b holds kPer = K / 8
// elements. With group = lane / 4 and first = kPer (lane % 4):
//   a[0] row group, a[1] row group + 8, columns first to first + kPer - 1; a[2] and a[3] the same, 4 kPer columns on
//   b[0] rows first to first + kPer - 1, b[1] 4 kPer rows on; column group
//   d[0], d[1] row group, d[2], d[3] row group + 8; columns 2 (lane % 4) and the next
// Here K = 16, T = bf16 or f16: "Matrix Fragments for mma.m16n8k16 with floating point type".
template <class T>
SIMPLCLIP_DEVICE void mma16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, bf16>) SIMPLCLIP_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  else SIMPLCLIP_MMA("m16n8k16.row.col.f32.f16.f16.f32");
}

// K = 8, in TF32: "Matrix Fragments for mma.m16n8k8", .tf32. The operands' low 13 bits are ignored.
SIMPLCLIP_DEVICE void mma1688_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  SIMPLCLIP_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}

// 8x8 matrices of 16-bit elements. Lanes 8 i to 8 i + 7 pass the addresses of matrix i's rows: 16 bytes of shared memory,
// 16-byte aligned. r[i] receives row lane / 4, columns 2 (lane % 4) and the next, of matrix i ("Warp-level matrix load
// instruction: ldmatrix"), as mma16816 takes them; _trans: rows 2 (lane % 4) and the next, column lane / 4.
SIMPLCLIP_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

SIMPLCLIP_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Copies 16 bytes, 16-byte aligned, to shared memory in the background; if not `valid`, writes zeros and does not read `global`.
// This thread sees the bytes after it has waited for their group, other threads after a barrier that follows.
SIMPLCLIP_DEVICE void cp_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
}

// Ends a group: the copies that this thread has started since its last group.
SIMPLCLIP_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Waits until at most the last N groups of this thread are unfinished.
template <int N>
SIMPLCLIP_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory");
}

}  // namespace simplclip::gpu
