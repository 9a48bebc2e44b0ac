// The instantiations of shaped_attention's kernels, and their launches for a type of tensors, each in a .cu file of its own.
#pragma once

#include <iterator>

#include "plan.h"
#include "stream.cuh"

namespace simplclip::gpu {

// Returns f(the plan's kernel), one with the bounds of entry kIndex of the table or of a later one.
template <class T, int kIndex = 0, class F>
auto with_forward_kernel(const ShapedPlan& plan, const F& f) {
  constexpr auto& table = kShapedForward[kBytes<T> == 4];
  constexpr ShapedBounds bounds = table[kIndex];
  if constexpr (kIndex + 1 < std::size(table)) {
    if (plan.bounds.size != bounds.size) return with_forward_kernel<T, kIndex + 1>(plan, f);
  }
  return f(shaped_attention_forward_kernel<T, bounds.size, bounds.threads, bounds.blocks>);
}

template <class T, int kIndex, class F>
auto with_stream(const F& f) {
  constexpr ShapedBounds bounds = kShapedStream[kBytes<T> == 4][kIndex];
  return f(shaped_attention_stream_kernel<T, bounds.size, bounds.threads, bounds.blocks>);
}

template <class T, class F>
auto with_backward_kernel(const ShapedPlan& plan, const F& f) {
  constexpr ShapedBounds whole = kShapedBackward[kBytes<T> == 4];
  if (plan.bounds.size == whole.size) return f(shaped_attention_backward_kernel<T, whole.size, whole.threads, whole.blocks>);
  return plan.bounds.size == kShapedStream[kBytes<T> == 4][0].size ? with_stream<T, 0>(f) : with_stream<T, 1>(f);
}

}  // namespace simplclip::gpu

#ifndef SIMPLCLIP_EMULATOR
namespace simplclip {

template <class Parameters>
const char* launch_shaped(void (*kernel)(Parameters), const ShapedPlan& plan, const Parameters& p, void* stream) {
  constexpr int kWithoutAsking = 48 << 10;
  cudaError_t error = cudaSuccess;
  if (plan.shared > kWithoutAsking) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared);
  if (!error) {
    const dim3 grid(p.batch * p.heads, plan.blocks);
    kernel<<<grid, plan.threads, plan.shared, static_cast<cudaStream_t>(stream)>>>(p);
    error = cudaGetLastError();
  }
  return error ? cudaGetErrorString(error) : nullptr;
}

template <class T>
const char* launch_shaped_forward(ShapedAttentionForward p, void* stream) {
  const ShapedPlan plan = plan_shaped_forward(p.length, p.width, gpu::kBytes<T> == 4);
  p.slice = plan.slice;
  return gpu::with_forward_kernel<T>(plan, [&](auto kernel) { return launch_shaped(kernel, plan, p, stream); });
}

template <class T>
const char* launch_shaped_backward(const ShapedAttentionBackward& p, void* stream) {
  const ShapedPlan plan = plan_shaped_backward(p.length, p.width, gpu::kBytes<T> == 4);
  return gpu::with_backward_kernel<T>(plan, [&](auto kernel) { return launch_shaped(kernel, plan, p, stream); });
}

}  // namespace simplclip

#define SIMPLCLIP_LAUNCHES(T)                                                                                         \
  template const char* simplclip::launch_shaped_forward<simplclip::gpu::T>(simplclip::ShapedAttentionForward, void*); \
  template const char* simplclip::launch_shaped_backward<simplclip::gpu::T>(const simplclip::ShapedAttentionBackward&, void*)
#endif
