// Chooses the kernel of shaped_attention for a call, its threads and its shared memory. Host code only.
#pragma once

#include <algorithm>

#include "attention.h"

namespace simplclip {

// An instantiation: `size` is the most tiles of 16 tokens, or the widest head of the streaming backward; its registers are
// limited for `threads` per block and `blocks` per multiprocessor.
struct ShapedBounds {
  int size, threads, blocks;
};

// [float32 or not], in increasing size
constexpr ShapedBounds kShapedForward[2][3] = {{{5, 160, 3}, {14, 160, 2}, {18, 96, 2}},
                                               {{5, 160, 2}, {14, 96, 2}, {18, 96, 2}}};
constexpr ShapedBounds kShapedBackward[2] = {{5, 160, 2}, {5, 160, 1}};
constexpr ShapedBounds kShapedStream[2][2] = {{{64, 192, 2}, {128, 192, 1}}, {{64, 128, 2}, {128, 128, 1}}};

constexpr int kShapedMaxTokens = 288;
constexpr int kShapedMaxWidth = 128;
// Shared memory on all architectures from sm_80 on, at least: per block, per multiprocessor, and reserved per block.
constexpr int kSharedOfBlock = 99 << 10, kSharedOfMultiprocessor = 100 << 10, kSharedKept = 1 << 10;

// A launch over (B H, blocks) blocks.
struct ShapedPlan {
  const char* kernel;
  ShapedBounds bounds;
  int threads, blocks;
  int shared;    // bytes, dynamic
  int slice;     // bytes of a row that forward stages at a time
  int products;  // of 16 x 16 tiles over a head's width, as without causal: forward has 2 for each pair of tiles, backward 5
  int resident;  // blocks per multiprocessor
};

// The reason why no kernel supports the call; null if one does.
inline const char* why_no_shaped_plan(int length, int width) {
  if (length < 1 || length > kShapedMaxTokens) return "serves 1 to 288 tokens";
  if (width < 16 || width > kShapedMaxWidth || width % 16) return "serves heads of width 16, 32, ... or 128";
  return nullptr;
}

namespace shaped_plan {

inline int tiles(int length) { return (length + 15) / 16; }

inline int up(int count, int of) { return (count + of - 1) / of; }

// The number of blocks, at most `blocks`, for which a multiprocessor has shared memory.
inline int fitting(int shared, int blocks) {
  return shared > kSharedOfBlock ? 0 : std::min(blocks, kSharedOfMultiprocessor / (shared + kSharedKept));
}

}  // namespace shaped_plan

inline ShapedPlan plan_shaped_forward(int length, int width, bool wide) {
  using namespace shaped_plan;
  const int all = tiles(length), bytes = wide ? 4 : 2, columns = width / 16;
  const ShapedBounds* bounds = kShapedForward[wide];
  while (bounds->size < all) ++bounds;
  const int groups = up(all, bounds->threads / 32), warps = up(all, groups);
  ShapedPlan plan{"forward", *bounds, warps * 32, groups, 0, 0, 2 * all * all, 0};
  // The widest slices with which `blocks` blocks fit, else with one block fewer, and so on.
  for (int resident = bounds->blocks; resident > 0; --resident) {
    for (int slices = 1; slices <= columns; ++slices) {
      plan.slice = up(columns, slices) * 16 * bytes;
      plan.shared = warps * 16 * width * bytes + 2 * all * 16 * plan.slice;
      plan.resident = fitting(plan.shared, resident);
      if (plan.resident == resident) return plan;
    }
  }
  return plan;
}

inline ShapedPlan plan_shaped_backward(int length, int width, bool wide) {
  using namespace shaped_plan;
  const int all = tiles(length), rows = all * 16, bytes = wide ? 4 : 2;
  const ShapedBounds& whole = kShapedBackward[wide];
  const int shared = 2 * rows * (width + std::max(rows, width)) * bytes + all * 3 * 4;
  if (all <= whole.size && shared <= kSharedOfBlock) {
    return {"backward", whole, all * 32, 1, shared, 0, 5 * all * all, fitting(shared, whole.blocks)};
  }
  const ShapedBounds& bounds = kShapedStream[wide][width > kShapedStream[wide][0].size];
  ShapedPlan plan{"stream", bounds, 0, 1, 0, 0, 9 * all * all, 0};
  // The fewest rounds over the tiles with which `blocks` blocks fit, else with one block fewer, and so on.
  for (int resident = bounds.blocks; resident > 0; --resident) {
    for (int most = bounds.threads / 32; most > 0; --most) {
      const int warps = up(all, up(all, most));
      plan.threads = warps * 32;
      plan.shared = (2 * warps + 4) * 16 * width * bytes + 3 * rows * 4 + warps * 3 * 4;
      plan.resident = fitting(plan.shared, resident);
      if (plan.resident == resident) return plan;
    }
  }
  return plan;
}

}  // namespace simplclip
