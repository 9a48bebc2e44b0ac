#include "instruction_set.h"

#if defined(__x86_64__)
#include <immintrin.h>
SIMPLCLIP_NEEDS_AVX512_BF16(SIMPLCLIP_COMPILE_FOR)
#define SIMPLCLIP_ISA avx512_bf16
#define SIMPLCLIP_LANES 16
#define SIMPLCLIP_NATIVE_BF16
#include "isa_kernels.h"
#endif
