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

// The instructions that each set needs: its file is compiled for them, and dispatch.cpp asks the CPU for them.
#define SIMPLCLIP_NEEDS_AVX2(f) f("avx2") f("fma")
#define SIMPLCLIP_NEEDS_AVX512(f) f("avx512f") f("avx512bw") f("avx512dq") f("avx512vl") f("fma")
#define SIMPLCLIP_NEEDS_AVX512_BF16(f) SIMPLCLIP_NEEDS_AVX512(f) f("avx512bf16")

#define SIMPLCLIP_PRAGMA(text) _Pragma(#text)
#define SIMPLCLIP_COMPILE_FOR(name) SIMPLCLIP_PRAGMA(GCC target(name))

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
