// Launches of shaped_attention's kernels. Each type of tensors has a .cu file of its own, which instantiates them.
#pragma once

#include "plan.h"
#include "backward.cuh"

namespace simplclip {
namespace gpu {

// Starts a kernel in a cudaStream_t. Returns null, or the error.
template <class Parameters>
const char* launch_shaped(void (*kernel)(Parameters), const ShapedPlan& plan, const Parameters& p, void* stream) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared);
  if (!error) {
    kernel<<<p.batch * p.heads, plan.threads, plan.shared, static_cast<cudaStream_t>(stream)>>>(p);
    error = cudaGetLastError();
  }
  return error ? cudaGetErrorString(error) : nullptr;
}

}  // namespace gpu

template <class T>
const char* launch_shaped_forward(ShapedAttentionForward p, void* stream) {
  const ShapedPlan plan = plan_shaped_forward(p.length, p.width, gpu::kBytes<T> == 4);
  p.slice = plan.slice;
  return gpu::launch_shaped(gpu::shaped_attention_forward_kernel<T, kShapedForward[gpu::kBytes<T> == 4]>, plan, p, stream);
}

template <class T>
const char* launch_shaped_backward(const ShapedAttentionBackward& p, void* stream) {
  const ShapedPlan plan = plan_shaped_backward(p.length, p.width, gpu::kBytes<T> == 4);
  return gpu::launch_shaped(gpu::shaped_attention_backward_kernel<T, kShapedBackward[gpu::kBytes<T> == 4]>, plan, p, stream);
}

}  // namespace simplclip

#define SIMPLCLIP_LAUNCHES(T)                                                                                         \
  template const char* simplclip::launch_shaped_forward<simplclip::gpu::T>(simplclip::ShapedAttentionForward, void*); \
  template const char* simplclip::launch_shaped_backward<simplclip::gpu::T>(const simplclip::ShapedAttentionBackward&, void*)
