// The last step of shaped_attention's backward.
#pragma once

#include "attention.h"
#include "../tile.cuh"

namespace simplclip::gpu {

// d_gains [3, H] from the blocks' [B, 3, H], in a fixed order: a warp for each gain of a head, each of whose
// lanes adds every 32nd sequence.
SIMPLCLIP_KERNEL void shaped_attention_gains_kernel(const float* parts, float* d_gains, int batch, int gains) {
  const int gain = block_x();
  float sum = 0;
  for (int i = lane(); i < batch; i += 32) sum += parts[int64_t(i) * gains + gain];
  sum = warp_sum(sum);
  if (lane() == 0) d_gains[gain] = sum;
}

}  // namespace simplclip::gpu
