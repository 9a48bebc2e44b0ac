#include "launch.cuh"

SIMPLCLIP_LAUNCHES(tf32);
