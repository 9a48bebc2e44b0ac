// Shaped attention of one head on a CPU.
#pragma once

#include <cstdint>

#include "../elementwise.h"

namespace simplclip {

struct Rows {  // [L, K] of one head: rows of K contiguous floats
  void* data;
  int64_t stride;  // elements from one row to the next
};

struct AttentionHead {
  Rows q, k, v;
  Float type;      // of all tensors but lse
  int64_t length;  // L
  int64_t valid;   // number of valid tokens: padded tokens are not read, and their results are zeros
  int64_t width;   // K
  bool causal;
  float scale, alpha, beta, gamma;
  float* lse;      // [L] written by forward
};

struct AttentionGrad {
  Rows grad;        // of the result
  Rows dq, dk, dv;  // written
};

// The functions of one instruction set. The scratch holds scratch_floats(L, K, is_backward) floats.
struct AttentionKernels {
  int64_t (*scratch_floats)(int64_t length, int64_t width, bool is_backward);
  void (*forward)(const AttentionHead&, Rows out, float* scratch);
  // gains [3]: the head's gradients of alpha, beta, gamma
  void (*backward)(const AttentionHead&, const AttentionGrad&, double* gains, float* scratch);
};

}  // namespace simplclip
