#include "launch.cuh"

SIMPLCLIP_LAUNCHES(bf16);
