#include "launch.cuh"

SIMPLCLIP_LAUNCHES(f16);
