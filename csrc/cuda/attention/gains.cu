#include "gains.cuh"
#include "launch.h"

namespace simplclip {

cudaError_t launch_shaped_gains(const float* parts, float* d_gains, int batch, int count, cudaStream_t stream) {
  gpu::shaped_attention_gains_kernel<<<count, 32, 0, stream>>>(parts, d_gains, batch, count);
  return cudaGetLastError();
}

}  // namespace simplclip
