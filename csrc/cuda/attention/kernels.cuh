// The instantiations of shaped_attention's kernels.
#pragma once

#include "plan.h"
#include "stream.cuh"

namespace simplclip::gpu {

template <class T, int kIndex, class F>
auto with_forward(const F& f) {
  constexpr ShapedBounds bounds = kShapedForward[kBytes<T> == 4][kIndex];
  return f(shaped_attention_forward_kernel<T, bounds.size, bounds.threads, bounds.blocks>);
}

template <class T, int kIndex, class F>
auto with_stream(const F& f) {
  constexpr ShapedBounds bounds = kShapedStream[kBytes<T> == 4][kIndex];
  return f(shaped_attention_stream_kernel<T, bounds.size, bounds.threads, bounds.blocks>);
}

// Returns f(the plan's kernel).
template <class T, class F>
auto with_forward_kernel(const ShapedPlan& plan, const F& f) {
  constexpr auto& bounds = kShapedForward[kBytes<T> == 4];
  if (plan.bounds.size == bounds[0].size) return with_forward<T, 0>(f);
  if (plan.bounds.size == bounds[1].size) return with_forward<T, 1>(f);
  return with_forward<T, 2>(f);
}

template <class T, class F>
auto with_backward_kernel(const ShapedPlan& plan, const F& f) {
  constexpr ShapedBounds whole = kShapedBackward[kBytes<T> == 4];
  if (plan.bounds.size == whole.size) return f(shaped_attention_backward_kernel<T, whole.size, whole.threads, whole.blocks>);
  return plan.bounds.size == kShapedStream[kBytes<T> == 4][0].size ? with_stream<T, 0>(f) : with_stream<T, 1>(f);
}

}  // namespace simplclip::gpu
