#include <cuda_runtime.h>

#include "device.h"

namespace simplclip {

namespace {
// Represents all kernels of this build, which are compiled for the same architectures.
__global__ void probe_kernel() {}
}  // namespace

const char* device_limits(int device, DeviceLimits* limits) {
  auto get = [&](int* to, cudaDeviceAttr attribute) { return cudaDeviceGetAttribute(to, attribute, device); };
  cudaError_t error = get(&limits->major, cudaDevAttrComputeCapabilityMajor);
  if (!error) error = get(&limits->minor, cudaDevAttrComputeCapabilityMinor);
  if (!error) error = get(&limits->multiprocessors, cudaDevAttrMultiProcessorCount);
  if (!error) error = get(&limits->shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (!error) error = get(&limits->shared_bytes_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  if (!error) error = get(&limits->registers_per_multiprocessor, cudaDevAttrMaxRegistersPerMultiprocessor);
  if (error) return cudaGetErrorString(error);

  int current = 0;
  cudaGetDevice(&current);
  cudaSetDevice(device);
  cudaFuncAttributes attributes;
  const bool runs = cudaFuncGetAttributes(&attributes, probe_kernel) == cudaSuccess;
  limits->binary_version = runs ? attributes.binaryVersion : 0;
  if (!runs) cudaGetLastError();
  cudaSetDevice(current);
  return nullptr;
}

}  // namespace simplclip
