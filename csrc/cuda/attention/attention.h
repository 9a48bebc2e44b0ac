// Arguments of shaped_attention's kernels, and their launches. Also for compilers without CUDA.
#pragma once

#include <cstdint>

namespace simplclip {

// A tensor [B, L, H, K] whose last dimension is contiguous; strides in bytes.
struct HeadsView {
  char* data;
  int64_t batch, row, head;
};

struct ShapedAttention {
  HeadsView q, k, v;
  const float* gains;    // [3, H]: alpha, beta, gamma
  const int32_t* lengths;  // [B] or null
  float* lse;            // [B, H, L]
  int batch, length, heads, width;
  float scale;
  bool causal;
};

struct ShapedAttentionForward : ShapedAttention {
  HeadsView out;
  int slice;  // bytes of a row that are staged at a time
};

struct ShapedAttentionBackward : ShapedAttention {
  HeadsView grad, dq, dk, dv;
  float* d_gains;  // [B, 3, H]
};

namespace gpu {
struct bf16;
struct f16;
struct tf32;
}  // namespace gpu

// T: a type of namespace gpu. Each address and stride is a multiple of 16 bytes, and why_no_shaped_plan is null. A launch returns
// null, or its error; `stream` is a cudaStream_t.
template <class T>
const char* launch_shaped_forward(ShapedAttentionForward p, void* stream);

template <class T>
const char* launch_shaped_backward(const ShapedAttentionBackward& p, void* stream);

// d_gains [count], the sums over the first dimension of parts [batch, count].
const char* launch_shaped_gains(const float* parts, float* d_gains, int batch, int count, void* stream);

}  // namespace simplclip
