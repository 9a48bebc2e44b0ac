// The instructions of tensor cores and of staging: mma, ldmatrix, cp.async; with SIMPLCLIP_EMULATOR for the host, as in
// thread.cuh, which this includes. Sections are named as in the PTX ISA.
#pragma once

#include "thread.cuh"

#ifdef SIMPLCLIP_EMULATOR
#include <cstring>
#endif

namespace simplclip::gpu {

#ifdef SIMPLCLIP_EMULATOR
struct Fragments {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

typedef float Row8 __attribute__((vector_size(32)));

// d += a b with a [16, K] and b [K, 8], from the fragments of all lanes; a register of a and b holds kPer = K / 8 elements, of
// which value(bits, i) is element i. With group = lane / 4 and first = kPer (lane % 4):
//   a[0] row group, a[1] row group + 8, columns first to first + kPer - 1; a[2] and a[3] the same, 4 kPer columns on
//   b[0] rows first to first + kPer - 1, b[1] 4 kPer rows on; column group
//   d[0], d[1] row group, d[2], d[3] row group + 8; columns 2 (lane % 4) and the next
template <int kPer, class F>
inline void multiply(const char* name, Site site, Fragments mine, F) {
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
#endif

#define SIMPLCLIP_MMA(shape_and_types)                                                                            \
  asm("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"      \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                            \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

// d += a b: a [16, 16] row-major, b [16, 8] column-major, T = bf16 or f16, sums in float32.
// Layout: "Matrix Fragments for mma.m16n8k16 with floating point type"; as in multiply with kPer = 2.
template <class T>
SIMPLCLIP_DEVICE void mma16816(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], [[maybe_unused]] Site site = Site::current()) {
#ifdef SIMPLCLIP_EMULATOR
  multiply<2>("mma16816", site, {d, a, b}, [](uint32_t bits, int i) { return widen<T>(bits >> i * 16 & 0xffff); });
#else
  if constexpr (std::is_same_v<T, bf16>) SIMPLCLIP_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  else SIMPLCLIP_MMA("m16n8k16.row.col.f32.f16.f16.f32");
#endif
}

// d += a b in TF32: a [16, 8] row-major, b [8, 8] column-major, sums in float32; the operands' low 13 bits are ignored.
// Layout: "Matrix Fragments for mma.m16n8k8", .tf32; as in multiply with kPer = 1.
SIMPLCLIP_DEVICE void mma1688_tf32(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], [[maybe_unused]] Site site = Site::current()) {
  SIMPLCLIP_ON(SIMPLCLIP_MMA("m16n8k8.row.col.f32.tf32.tf32.f32"),
               multiply<1>("mma1688_tf32", site, {d, a, b}, [](uint32_t bits, int) { return as_float(bits & 0xffffe000u); }));
}

#ifdef SIMPLCLIP_EMULATOR
// A lane's row is read when the lane arrives, without what other lanes write later unless there is a sync_warp between.
template <bool TRANSPOSED>
inline void load_matrices(const char* name, Site site, uint32_t (&r)[4], const void* row) {
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
#endif

// 8x8 matrices of 16-bit elements. Lanes 8 i to 8 i + 7 pass the addresses of matrix i's rows: 16 bytes of shared memory,
// 16-byte aligned. r[i] receives row lane / 4, columns 2 (lane % 4) and the next, of matrix i ("Warp-level matrix load
// instruction: ldmatrix"), as mma16816 takes them; _trans: rows 2 (lane % 4) and the next, column lane / 4.
SIMPLCLIP_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row, [[maybe_unused]] Site site = Site::current()) {
  SIMPLCLIP_ON(asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                            : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                            : "r"(shared_address(row))
                            : "memory"),
               load_matrices<false>("ldmatrix_x4", site, r, row));
}

SIMPLCLIP_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, [[maybe_unused]] Site site = Site::current()) {
  SIMPLCLIP_ON(asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                            : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                            : "r"(shared_address(row))
                            : "memory"),
               load_matrices<true>("ldmatrix_x4_trans", site, r, row));
}

// Copies 16 bytes, aligned to as many, to shared memory in the background; if not `valid`, zeros, and `global` is
// not read. Visible to this thread after the wait for its group, to others after a barrier that follows.
SIMPLCLIP_DEVICE void cp_async_16(
    void* shared, const void* global, bool valid, [[maybe_unused]] Site site = Site::current()) {
  SIMPLCLIP_ON(asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                            :
                            : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
                            : "memory"),
               emulator::cp_async("cp_async_16", site, shared, global, 16, valid));
}

// Ends a group: this thread's copies since the last one.
SIMPLCLIP_DEVICE void cp_async_commit() {
  SIMPLCLIP_ON(asm volatile("cp.async.commit_group;" : : : "memory"), emulator::cp_async_commit());
}

// Waits until at most the last N groups of this thread are unfinished.
template <int N>
SIMPLCLIP_DEVICE void cp_async_wait() {
  SIMPLCLIP_ON(asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory"), emulator::cp_async_wait(N));
}

}  // namespace simplclip::gpu
