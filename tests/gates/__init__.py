"""Gates for the machine code of the GPU kernels, which need no GPU.

`make aot` runs all of them, test_gates.py a part.
"""
