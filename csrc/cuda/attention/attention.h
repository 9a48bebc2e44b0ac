// Arguments of shaped_attention's kernels. Also for compilers without CUDA.
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

}  // namespace simplclip
