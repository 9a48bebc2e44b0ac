// Arguments of shaped_attention's kernels, and their launches. Compilers without CUDA can include this header.
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

// Launches a kernel on `stream`, a cudaStream_t, and returns null or the error. T is a type of namespace gpu. Each address and
// stride must be a multiple of 16 bytes, and why_no_shaped_plan must return null.
template <class T>
const char* launch_shaped_forward(ShapedAttentionForward p, void* stream);

template <class T>
const char* launch_shaped_backward(const ShapedAttentionBackward& p, void* stream);

}  // namespace simplclip
