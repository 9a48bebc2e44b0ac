// shaped_attention on a GPU: what a launch takes, and its plan. Also for compilers that know no CUDA.
#pragma once

#include <cstdint>

namespace simplclip {

enum class ShapedType { kFloat16, kBFloat16, kTF32 };

// A tensor [B, L, H, K], the last dimension dense; strides in bytes.
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

// A launch over (B H, blocks) blocks. `refusal` says why there is none.
struct ShapedPlan {
  const char* refusal;
  const char* kernel;
  int tiles;     // template argument: the most tiles of 16 tokens; of the streaming backward the widest head
  int threads;
  int blocks;    // that share a head
  int shared;    // bytes of dynamic shared memory
  int slice;     // bytes
  int products;  // of 16 x 16 tiles along a head, not causal: attention's own 2 (forward) or 5 (backward) of each, and more
  int resident;  // blocks that a multiprocessor with 100 KiB of shared memory and 64 Ki registers is meant to hold
};

constexpr int kShapedMaxLength = 288;
constexpr int kShapedMaxWidth = 128;

ShapedPlan plan_shaped_forward(int length, int width, ShapedType type);
ShapedPlan plan_shaped_backward(int length, int width, ShapedType type);

}  // namespace simplclip
