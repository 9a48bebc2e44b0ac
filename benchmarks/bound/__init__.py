"""Predicted times of the GPU's kernels and of whole calls, from machine code, bytes and launches; no GPU is needed."""

import os

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: interpreted kernels cannot be compiled
