// The kernels that are compiled once for each instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "attention/head.h"
#include "elementwise.h"
#include "similarity/strip.h"

namespace simplclip {

struct InstructionSet {
  const char* name;
  StripKernels strip;
  AttentionKernels attention;
  ElementwiseKernels elementwise;
};

const InstructionSet& instruction_set();  // the best one that this CPU supports, unless SIMPLCLIP_CPU_ISA names another
bool has_native_bf16();                   // whether this CPU multiplies bfloat16 in hardware

}  // namespace simplclip
