// The instantiations of shaped_attention's kernels, and their launches for a type of tensors, each in a .cu file of its own.
#pragma once

#include "plan.h"
#include "stream.cuh"

namespace simplclip {
namespace gpu {

template <class T>
auto forward_kernel(int size) -> void (*)(ShapedAttentionForward) {
  constexpr auto& table = kShapedForward[kBytes<T> == 4];
  constexpr ShapedBounds few = table[0], some = table[1], most = table[2];
  if (size == few.size) return shaped_attention_forward_kernel<T, few.size, few.threads, few.blocks>;
  if (size == some.size) return shaped_attention_forward_kernel<T, some.size, some.threads, some.blocks>;
  return shaped_attention_forward_kernel<T, most.size, most.threads, most.blocks>;
}

template <class T>
auto backward_kernel(int size) -> void (*)(ShapedAttentionBackward) {
  constexpr bool kFloat = kBytes<T> == 4;
  constexpr ShapedBounds whole = kShapedBackward[kFloat], narrow = kShapedStream[kFloat][0], wide = kShapedStream[kFloat][1];
  if (size == whole.size) return shaped_attention_backward_kernel<T, whole.size, whole.threads, whole.blocks>;
  if (size == narrow.size) return shaped_attention_stream_kernel<T, narrow.size, narrow.threads, narrow.blocks>;
  return shaped_attention_stream_kernel<T, wide.size, wide.threads, wide.blocks>;
}

template <class Parameters>
const char* launch_shaped(void (*kernel)(Parameters), const ShapedPlan& plan, const Parameters& p, void* stream) {
  return launch_kernel(kernel, {unsigned(p.batch * p.heads), unsigned(plan.blocks)}, plan.threads, plan.shared, stream, p);
}

}  // namespace gpu

template <class T>
const char* launch_shaped_forward(ShapedAttentionForward p, void* stream) {
  const ShapedPlan plan = plan_shaped_forward(p.length, p.width, gpu::kBytes<T> == 4);
  p.slice = plan.slice;
  return gpu::launch_shaped(gpu::forward_kernel<T>(plan.bounds.size), plan, p, stream);
}

template <class T>
const char* launch_shaped_backward(const ShapedAttentionBackward& p, void* stream) {
  const ShapedPlan plan = plan_shaped_backward(p.length, p.width, gpu::kBytes<T> == 4);
  return gpu::launch_shaped(gpu::backward_kernel<T>(plan.bounds.size), plan, p, stream);
}

}  // namespace simplclip

#define SIMPLCLIP_LAUNCHES(T)                                                                                         \
  template const char* simplclip::launch_shaped_forward<simplclip::gpu::T>(simplclip::ShapedAttentionForward, void*); \
  template const char* simplclip::launch_shaped_backward<simplclip::gpu::T>(const simplclip::ShapedAttentionBackward&, void*)
