#include "attention/gains.cuh"
#include "attention/launch.cuh"

#include "binding.h"

using namespace simplclip;
using namespace simplclip::gpu;
using emulator::launch;

namespace {

// `tensors`: address and strides (B, L, H) in bytes for each.
HeadsView view(const int64_t* tensors, int index) {
  const int64_t* t = tensors + 4 * index;
  return {reinterpret_cast<char*>(t[0]), t[1], t[2], t[3]};
}

ShapedPlan plan_of(const char* type, int length, int width, bool backward) {
  const bool wide = *type == 't';
  return backward ? plan_shaped_backward(length, width, wide) : plan_shaped_forward(length, width, wide);
}

ShapedAttention shaped(const int64_t* tensors, const float* gains, const int32_t* lengths, float* lse, const int* sizes,
                       double scale, bool causal) {
  return {view(tensors, 0), view(tensors, 1), view(tensors, 2), gains,    lengths, lse, sizes[0], sizes[1],
          sizes[2],         sizes[3],         float(scale),     causal};
}

// tensors: q, k, v, out; sizes: B, L, H, K. Returns the replays of ldmatrix, as `backward` does.
int64_t forward(const char* type, const int64_t* tensors, const float* gains, const int32_t* lengths, float* lse,
                const int* sizes, double scale, bool causal, uint64_t seed) {
  const ShapedPlan plan = plan_of(type, sizes[1], sizes[3], false);
  const ShapedAttentionForward p{shaped(tensors, gains, lengths, lse, sizes, scale, causal), view(tensors, 3), plan.slice};
  auto run = [&](auto kernel) {
    const emulator::Dim3 grid{unsigned(sizes[0] * sizes[2]), unsigned(plan.blocks)};
    return launch(grid, plan.threads, plan.shared, seed, [&] { kernel(p); }).replays;
  };
  if (*type == 'f') return with_forward_kernel<f16>(plan, run);
  if (*type == 'b') return with_forward_kernel<bf16>(plan, run);
  return with_forward_kernel<tf32>(plan, run);
}

// tensors: q, k, v, grad, dq, dk, dv; parts: [B, 3, H]
int64_t backward(const char* type, const int64_t* tensors, const float* gains, const int32_t* lengths, float* lse,
                 const int* sizes, double scale, bool causal, float* parts, uint64_t seed) {
  const ShapedPlan plan = plan_of(type, sizes[1], sizes[3], true);
  const ShapedAttentionBackward p{shaped(tensors, gains, lengths, lse, sizes, scale, causal),
                                  view(tensors, 3), view(tensors, 4), view(tensors, 5), view(tensors, 6), parts};
  auto run = [&](auto kernel) {
    return launch({unsigned(sizes[0] * sizes[2])}, plan.threads, plan.shared, seed, [&] { kernel(p); }).replays;
  };
  if (*type == 'f') return with_backward_kernel<f16>(plan, run);
  if (*type == 'b') return with_backward_kernel<bf16>(plan, run);
  return with_backward_kernel<tf32>(plan, run);
}

// parts: [B, count]
void sum_gains(const float* parts, float* d_gains, int batch, int count, uint64_t seed) {
  launch({unsigned(count)}, 32, 0, seed, [&] { shaped_attention_gains_kernel(parts, d_gains, batch, count); });
}

EMULATED(forward);
EMULATED(backward);
EMULATED(sum_gains);

}  // namespace
