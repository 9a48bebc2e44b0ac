"""Triton kernels and their launchers, one file per op, without autograd. Installed as simplclip.kernels."""
