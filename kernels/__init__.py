"""Triton kernels and their launchers, one folder per op, without autograd.

Installed as simplclip.kernels.
"""
