// The last step of shaped_attention's backward.
#include "attention.h"
#include "../tile.cuh"

namespace simplclip {
namespace gpu {

// Sums the blocks' parts [B, 3, H] to d_gains [3, H] in a fixed order. Each gain of a head has a warp, each lane of which adds
// every 32nd sequence.
__global__ void shaped_attention_gains_kernel(const float* parts, float* d_gains, int batch, int gains) {
  const int gain = block_x();
  float sum = 0;
  for (int i = lane(); i < batch; i += 32) sum += parts[int64_t(i) * gains + gain];
  sum = warp_sum(sum);
  if (lane() == 0) d_gains[gain] = sum;
}

}  // namespace gpu

const char* launch_shaped_gains(const float* parts, float* d_gains, int batch, int count, void* stream) {
  return gpu::launch_kernel(gpu::shaped_attention_gains_kernel, {unsigned(count)}, 32, 0, stream, parts, d_gains, batch, count);
}

}  // namespace simplclip
