"""Predicts how fast the GPU kernels of this library are, from their machine code, without a GPU."""
