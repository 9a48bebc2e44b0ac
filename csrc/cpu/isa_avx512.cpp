#include "instruction_set.h"

#if defined(__x86_64__)
#include <immintrin.h>
SIMPLCLIP_NEEDS_AVX512(SIMPLCLIP_COMPILE_FOR)
#define SIMPLCLIP_ISA avx512
#define SIMPLCLIP_LANES 16
#include "isa_kernels.h"
#endif
