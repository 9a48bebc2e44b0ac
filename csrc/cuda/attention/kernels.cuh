// The instantiations of shaped_attention's kernels.
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
