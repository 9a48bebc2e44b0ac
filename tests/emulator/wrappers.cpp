#include "wrappers.cuh"

#include <string_view>

#include "binding.h"

using namespace simplclip::gpu;
using simplclip::emulator::launch;

namespace {

// type: 16 for f16, 19 for TF32, anything else for bf16.
void mma(int type, const uint32_t* a, const uint32_t* b, float* d, uint64_t seed) {
  auto kernel = type == 16 ? mma_kernel<f16> : type == 19 ? mma_kernel<float> : mma_kernel<bf16>;
  launch({1}, 32, 0, seed, [=] { kernel(a, b, d); });
}

// Returns the replays.
int64_t ldmatrix(const char* memory, const int* offsets, bool transposed, uint32_t* out, uint64_t seed) {
  return launch({1}, 32, 1024, seed, [=] { ldmatrix_kernel(memory, offsets, transposed, out); }).replays;
}

void cp_async(const char* from, int valid, uint32_t* early, uint32_t* late, uint64_t seed) {
  launch({1}, 32, 1024, seed, [=] { cp_async_kernel(from, valid, early, late); });
}

void convert(bool half, const float* in, int pairs, uint32_t* packed, float* back, uint32_t* tf32, float* power) {
  auto kernel = half ? convert_kernel<f16> : convert_kernel<bf16>;
  launch({1}, 64, 0, 1, [=] { kernel(in, pairs, packed, back, tf32, power); });
}

// Kernels that do one thing wrong, in a block of 64 threads with 256 bytes of shared memory.
void fault(const char* name, float* global /* [64] */, uint64_t seed) {
  const std::string_view kind = name;
  auto kernel = [=] {
    char* shared = shared_memory();
    uint32_t r[4];
    if (kind == "two barriers") {
      if (thread() < 40) {
        sync_block();
      } else {
        sync_block();
      }
    }
    if (kind == "missing thread" && thread() != 33) sync_block();
    if (kind == "divergent warp") {
      if (lane() < 20) {
        shuffle_xor(1.0f, 1);
      } else {
        ldmatrix_x4(r, shared);
      }
    }
    if (kind == "missing lane" && lane() != 3) shuffle_xor(1.0f, 1);
    if (kind == "misaligned ldmatrix") ldmatrix_x4(r, shared + lane() % 8 * 16 + (lane() == 9 ? 8 : 0));
    if (kind == "misaligned cp.async") cp_async_16(shared, reinterpret_cast<char*>(global) + 8, true);
    if (kind == "outside") cp_async_16(shared + 256, global, false);
    if (kind == "shared overrun") reinterpret_cast<float*>(shared)[thread() + 1] = 1;
    if (kind == "global overrun") global[thread() + 1] = 1;
    if (kind == "misaligned vector") reinterpret_cast<float2*>(shared + 4)->x = 1;
    global[thread()] = kind == "unwritten" ? reinterpret_cast<float*>(shared)[thread()] : 2;
    reinterpret_cast<float*>(shared)[thread()] = 1;
  };
  launch({2}, 64, 256, seed, kernel);
}

EMULATED(mma);
EMULATED(ldmatrix);
EMULATED(cp_async);
EMULATED(convert);
EMULATED(fault);

}  // namespace
