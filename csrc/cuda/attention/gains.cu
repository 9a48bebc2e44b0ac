#include "gains.cuh"

namespace simplclip {

const char* launch_shaped_gains(const float* parts, float* d_gains, int batch, int count, void* stream) {
  gpu::shaped_attention_gains_kernel<<<count, 32, 0, static_cast<cudaStream_t>(stream)>>>(parts, d_gains, batch, count);
  const cudaError_t error = cudaGetLastError();
  return error ? cudaGetErrorString(error) : nullptr;
}

}  // namespace simplclip
