#include <cuda_runtime.h>

namespace simplclip {

namespace {
// Stands for all kernels of this build, since all are compiled for the same architectures.
__global__ void probe_kernel() {}
}  // namespace

// Returns the architecture of this build's code that runs on the device, or 0 if none does.
int binary_version(int device) {
  int current = 0;
  cudaGetDevice(&current);
  cudaSetDevice(device);
  cudaFuncAttributes attributes;
  const bool runs = cudaFuncGetAttributes(&attributes, probe_kernel) == cudaSuccess;
  if (!runs) cudaGetLastError();
  cudaSetDevice(current);
  return runs ? attributes.binaryVersion : 0;
}

}  // namespace simplclip
