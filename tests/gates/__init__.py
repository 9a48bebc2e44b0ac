"""The gates of what the compilers make of the GPU kernels, without a GPU; `make aot` runs them all, test_gates.py a part."""

import os

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: interpreted kernels cannot be compiled
