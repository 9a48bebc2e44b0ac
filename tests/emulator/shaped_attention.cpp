#include "attention/gains.cu"
#include "attention/launch.cuh"

#include "binding.h"

using namespace simplclip;
using namespace simplclip::gpu;

namespace {

// `tensors`: address and strides (B, L, H) in bytes for each.
HeadsView view(const int64_t* tensors, int index) {
  const int64_t* t = tensors + 4 * index;
  return {reinterpret_cast<char*>(t[0]), t[1], t[2], t[3]};
}

ShapedAttention shaped(const int64_t* tensors, const float* gains, const int32_t* lengths, float* lse, const int* sizes,
                       double scale, bool causal) {
  return {view(tensors, 0), view(tensors, 1), view(tensors, 2), gains,    lengths, lse, sizes[0], sizes[1],
          sizes[2],         sizes[3],         float(scale),     causal};
}

// tensors: q, k, v, out; sizes: B, L, H, K. Returns the replays of ldmatrix, as `backward` does.
int64_t forward(const char* type, const int64_t* tensors, const float* gains, const int32_t* lengths, float* lse,
                const int* sizes, double scale, bool causal, void* seed) {
  const ShapedAttentionForward p{shaped(tensors, gains, lengths, lse, sizes, scale, causal), view(tensors, 3), 0};
  if (*type == 'f') launch_shaped_forward<f16>(p, seed);
  if (*type == 'b') launch_shaped_forward<bf16>(p, seed);
  if (*type == 't') launch_shaped_forward<tf32>(p, seed);
  return emulator::engine.report.replays;
}

// tensors: q, k, v, grad, dq, dk, dv; parts: [B, 3, H]
int64_t backward(const char* type, const int64_t* tensors, const float* gains, const int32_t* lengths, float* lse,
                 const int* sizes, double scale, bool causal, float* parts, void* seed) {
  const ShapedAttentionBackward p{shaped(tensors, gains, lengths, lse, sizes, scale, causal),
                                  view(tensors, 3), view(tensors, 4), view(tensors, 5), view(tensors, 6), parts};
  if (*type == 'f') launch_shaped_backward<f16>(p, seed);
  if (*type == 'b') launch_shaped_backward<bf16>(p, seed);
  if (*type == 't') launch_shaped_backward<tf32>(p, seed);
  return emulator::engine.report.replays;
}

// parts: [B, count]
void sum_gains(const float* parts, float* d_gains, int batch, int count, void* seed) {
  launch_shaped_gains(parts, d_gains, batch, count, seed);
}

EMULATED(forward);
EMULATED(backward);
EMULATED(sum_gains);

}  // namespace
