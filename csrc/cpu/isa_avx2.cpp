#include "instruction_set.h"

#if defined(__x86_64__)
SIMPLCLIP_NEEDS_AVX2(SIMPLCLIP_COMPILE_FOR)
#define SIMPLCLIP_ISA avx2
#define SIMPLCLIP_LANES 8
#include "isa_kernels.h"
#endif
