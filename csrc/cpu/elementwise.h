// Loops over floats on a CPU.
#pragma once

#include <cstdint>

#include "float_type.h"

namespace simplclip {

enum class Activation { kGelu, kGeluTanh, kQuickGelu, kRelu, kSilu };

// The functions of one instruction set, over `count` floats.
struct ElementwiseKernels {
  void (*activate)(Activation, Float, const void* h, void* to, int64_t count);  // to = act(h)
  // to = grad act'(h); `to` may be either of them
  void (*activate_backward)(Activation, Float, const void* h, const void* grad, void* to, int64_t count);
  void (*add)(Float, const void* from, void* to, int64_t count);            // to += from
  void (*accumulate)(Float, const void* part, float* sum, int64_t count);   // sum += part
  void (*round)(Float, const float* from, void* to, int64_t count);         // to = from
};

}  // namespace simplclip
