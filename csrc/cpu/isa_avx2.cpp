#include "instruction_set.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,bmi2")
#define SIMPLCLIP_ISA avx2
#define SIMPLCLIP_LANES 8
#include "isa_kernels.h"
#endif
