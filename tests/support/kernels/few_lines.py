"""Runs a few lines of PTX on tests/ptx."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ptx.machine import Batch, Code, Launch, Machine
from ptx.memory import GlobalMemory
from ptx.parse import Kernel, parse

TEXT = """
.extern .shared .align 16 .b8 smem[];
.visible .entry test(.param .u64 p0)
{{
.reg .pred %p<8>;
.reg .b16 %h<32>;
.reg .b32 %r<80>;
.reg .b64 %d<32>;
mov.u32 %r0, %tid.x;
mov.b32 %r1, smem;
{body}
ret;
}}
"""


def kernel_of(body: str) -> Kernel:
    """Returns a kernel with the thread in %r0, the address of shared memory in %r1."""
    return parse(TEXT.format(body=body))["test"]


def execute(body: str, *arrays: np.ndarray, **options: Any) -> Batch:
    """Runs instructions with the addresses of the arrays in %d0, %d1, ...; see run_kernel."""
    return run_kernel(kernel_of(body), *arrays, **options)


def run_kernel(
    kernel: Kernel,
    *arrays: np.ndarray,
    threads: int = 32,
    programs: int = 1,
    shared: int = 4096,
    **registers: np.ndarray,
) -> Batch:
    code = Code(kernel)
    tensors = [torch.from_numpy(array) for array in arrays]
    memory = GlobalMemory(tensors, code.granules["global"])
    launch = Launch(code, programs, threads, shared, np.zeros(0, np.uint8), memory)
    batch = Batch(Machine(), launch, np.arange(programs))
    for place, tensor in enumerate(tensors):
        batch.registers["64"][place] = memory.address(tensor)
    for name, values in registers.items():
        bank = {"h": "16", "r": "32", "d": "64"}[name[0]]
        batch.registers[bank][int(name[1:])] = values.view(f"u{values.itemsize}")
    with np.errstate(all="ignore"):
        batch.run()
    memory.write_back()
    return batch


def vectors(first: int, words: np.ndarray) -> dict[str, np.ndarray]:  # [lanes, count]
    return {f"r{first + place}": column for place, column in enumerate(words.T)}
