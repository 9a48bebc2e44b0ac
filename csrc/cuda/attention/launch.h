// Launches of shaped_attention's kernels.
#pragma once

#include <cuda_runtime.h>

#include "attention.h"

namespace simplclip {

namespace gpu {
struct bf16;
struct f16;
struct tf32;
}  // namespace gpu

// T: bf16, f16 or tf32 of namespace gpu. Every address and stride is a multiple of 16 bytes, and why_no_shaped_plan is null.
template <class T>
cudaError_t launch_shaped_forward(ShapedAttentionForward p, cudaStream_t stream);

template <class T>
cudaError_t launch_shaped_backward(const ShapedAttentionBackward& p, cudaStream_t stream);

// d_gains [count], the sums over the first dimension of parts [batch, count].
cudaError_t launch_shaped_gains(const float* parts, float* d_gains, int batch, int count, cudaStream_t stream);

}  // namespace simplclip
