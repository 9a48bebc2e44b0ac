#include "instruction_set.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx512bf16,fma,f16c,bmi2")
#define SIMPLCLIP_ISA avx512_bf16
#define SIMPLCLIP_LANES 16
#define SIMPLCLIP_NATIVE_BF16
#include "isa_kernels.h"
#endif
