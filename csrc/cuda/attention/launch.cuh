// Instantiated by the .cu files of shaped_attention, one for each type of tensors.
#pragma once

#include "kernels.cuh"
#include "launch.h"

namespace simplclip {

template <class Parameters>
cudaError_t launch_shaped(void (*kernel)(Parameters), const ShapedPlan& plan, const Parameters& p, cudaStream_t stream) {
  constexpr int kWithoutAsking = 48 << 10;
  if (plan.shared > kWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared);
    if (error != cudaSuccess) return error;
  }
  kernel<<<dim3(p.batch * p.heads, plan.blocks), plan.threads, plan.shared, stream>>>(p);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_shaped_forward(ShapedAttentionForward p, cudaStream_t stream) {
  const ShapedPlan plan = plan_shaped_forward(p.length, p.width, gpu::kBytes<T> == 4);
  p.slice = plan.slice;
  return gpu::with_forward_kernel<T>(plan, [&](auto kernel) { return launch_shaped(kernel, plan, p, stream); });
}

template <class T>
cudaError_t launch_shaped_backward(const ShapedAttentionBackward& p, cudaStream_t stream) {
  const ShapedPlan plan = plan_shaped_backward(p.length, p.width, gpu::kBytes<T> == 4);
  return gpu::with_backward_kernel<T>(plan, [&](auto kernel) { return launch_shaped(kernel, plan, p, stream); });
}

}  // namespace simplclip

#define SIMPLCLIP_LAUNCHES(T)                                                                                        \
  template cudaError_t simplclip::launch_shaped_forward<simplclip::gpu::T>(ShapedAttentionForward, cudaStream_t);    \
  template cudaError_t simplclip::launch_shaped_backward<simplclip::gpu::T>(const ShapedAttentionBackward&, cudaStream_t)
