#include "instruction_set.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,fma,f16c,bmi2")
#define SIMPLCLIP_ISA avx512
#define SIMPLCLIP_LANES 16
#include "isa_kernels.h"
#endif
