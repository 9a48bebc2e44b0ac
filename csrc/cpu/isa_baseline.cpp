#include "instruction_set.h"

#define SIMPLCLIP_ISA baseline
#define SIMPLCLIP_LANES 4
#include "isa_kernels.h"
