// Chooses the kernel of shaped_attention for a call, its threads and its shared memory. Host code only.
#pragma once

#include <algorithm>

#include "attention.h"

namespace simplclip {

constexpr int kShapedTiles = 5;  // most tiles of 16 tokens: a warp serves a tile, with all of a row's logits in registers
constexpr int kShapedMaxTokens = kShapedTiles * 16;
constexpr int kShapedMaxWidth = 128;
constexpr int kShapedThreads = kShapedTiles * 32;
// Blocks per multiprocessor for which the registers are limited; index 1 is float32, index 0 the half types.
constexpr int kShapedForward[2] = {3, 2};
constexpr int kShapedBackward[2] = {2, 1};
// Bytes of shared memory, at least, from sm_80 on: per block, per multiprocessor, and reserved per block.
constexpr int kSharedOfBlock = 99 << 10, kSharedOfMultiprocessor = 100 << 10, kSharedKept = 1 << 10;

// A launch over B H blocks.
struct ShapedPlan {
  const char* kernel;
  int threads;
  int shared;    // bytes, dynamic
  int slice;     // bytes of a row that forward stages at a time
  int products;  // of 16 x 16 tiles over a head's width, as without causal: 2 for each pair of tiles in forward, 5 in backward
  int resident;  // blocks per multiprocessor
};

namespace shaped_plan {

inline int tiles(int length) { return (length + 15) / 16; }

inline int up(int count, int of) { return (count + of - 1) / of; }

// Returns the number of blocks, at most `blocks`, for which a multiprocessor has shared memory.
inline int fitting(int shared, int blocks) {
  return shared > kSharedOfBlock ? 0 : std::min(blocks, kSharedOfMultiprocessor / (shared + kSharedKept));
}

}  // namespace shaped_plan

inline ShapedPlan plan_shaped_forward(int length, int width, bool wide) {
  using namespace shaped_plan;
  const int all = tiles(length), bytes = wide ? 4 : 2, columns = width / 16;
  ShapedPlan plan{"forward", all * 32, 0, 0, 2 * all * all, 0};
  // Takes the widest slices with which the most blocks fit. If none fit, tries one block fewer, and so on.
  for (int resident = kShapedForward[wide]; resident > 0; --resident) {
    for (int slices = 1; slices <= columns; ++slices) {
      plan.slice = up(columns, slices) * 16 * bytes;
      plan.shared = all * 16 * width * bytes + 2 * all * 16 * plan.slice;
      plan.resident = fitting(plan.shared, resident);
      if (plan.resident == resident) return plan;
    }
  }
  return plan;
}

inline ShapedPlan plan_shaped_backward(int length, int width, bool wide) {
  using namespace shaped_plan;
  const int all = tiles(length), rows = all * 16, bytes = wide ? 4 : 2;
  const int shared = 2 * rows * (width + std::max(rows, width)) * bytes + all * 3 * 4;
  return {"backward", all * 32, shared, 0, 5 * all * all, fitting(shared, kShapedBackward[wide])};
}

// Returns the reason why no kernel supports the call; null if one does.
inline const char* why_no_shaped_plan(int length, int width, bool wide) {
  if (length < 1 || length > kShapedMaxTokens) return "serves 1 to 80 tokens";
  if (width < 16 || width > kShapedMaxWidth || width % 16) return "serves heads of width 16, 32, ... or 128";
  if (!plan_shaped_backward(length, width, wide).resident) return "serves float32 heads that fit in shared memory";
  return nullptr;
}

}  // namespace simplclip
