// Types of floats in memory, and loops over floats on a CPU.
#pragma once

#include <cstdint>

namespace simplclip {

enum class Float { kFloat, kBFloat16, kHalf };

enum class Activation { kGelu, kGeluTanh, kQuickGelu, kRelu, kSilu };

// The functions of one instruction set, over `count` floats.
struct ElementwiseKernels {
  // to = act(h), or with `grad` grad act'(h); `to` may be h or grad
  void (*activate)(Activation, Float, const void* h, const void* grad, void* to, int64_t count);
  void (*convert)(Float from_type, const void* from, Float to_type, void* to, int64_t count, bool add);  // to = from, or += from
};

}  // namespace simplclip
