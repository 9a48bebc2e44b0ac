"""Compiles the Triton kernels ahead of time and gates what the compiler made of them; needs no GPU.

    python -m benchmarks.aot                            the launches that fill the registers most, every architecture
    python -m benchmarks.aot --all                      every launch a call can ask for
    python -m benchmarks.aot --arch 86 --dtype bfloat16

Prints a line per kernel: registers, shared memory, stack, spills, blocks per multiprocessor, instructions and tensor-core
instructions; the CUDA extension's kernels (where it is built) and the launches they are planned for in the same table.
Exits with 1 if a gate fails.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: interpreted kernels cannot be compiled

import torch
import triton

from benchmarks import aot_extension as extension
from benchmarks.aot_gate import BIN, LIMITS, OPCODE, Row, blocks_per_multiprocessor, gated, spills_and_tensor_cores, table
from benchmarks.aot_kernels import DTYPES, Kernel, compile_kernel, kernels


def disassemble(path: Path) -> tuple[str, str]:
    """Resource usage and machine code of a cubin or an extension."""
    return tuple(
        subprocess.run([BIN / "cuobjdump", option, path], capture_output=True, text=True, check=True).stdout
        for option in ("-res-usage", "-sass")
    )


def measure(kernel: Kernel, architecture: int) -> Row:
    """Compiles a kernel and gates it."""
    compiled = compile_kernel(kernel, architecture)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = disassemble(Path(file.name))
    codes = OPCODE.findall(sass)
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    shared, warps = compiled.metadata.shared, kernel.tile.warps
    tile = f"{kernel.tile.block_m}x{kernel.tile.block_n}x{kernel.tile.block_k}/{kernel.tile.stages}" if kernel.tile[0] else ""
    spills, tensor_core = spills_and_tensor_cores(codes)
    row = Row(
        re.sub(r"^_(similarity_)?|_kernel$", "", kernel.name), kernel.planes, kernel.dtype, architecture, tile,
        registers, shared, stack, spills, warps,
        blocks_per_multiprocessor(architecture, registers, shared, warps), len(codes), tensor_core,
    )  # fmt: skip
    if row.blocks < kernel.tile.blocks:
        row.failures.append(f"{row.blocks} blocks per multiprocessor, planned {kernel.tile.blocks}")
    if kernel.tensor_cores and kernel.dtype != "float32" and not row.tensor_core:
        row.failures.append("no tensor-core instructions")
    return gated(row)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every launch, not only the heaviest")
    parser.add_argument("--arch", type=int, action="append", choices=LIMITS, help="default: all")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="default: all")
    options = parser.parse_args()
    rows = []
    if extension.why_not() is None:
        found = extension.compiled(options.arch or LIMITS)
        rows = extension.rows(found) + extension.launches(found)
    else:
        print(f"CUDA extension: {extension.why_not()}")
    for architecture in options.arch or LIMITS:
        for dtype in options.dtype or DTYPES:
            rows += [measure(kernel, architecture) for kernel in kernels(dtype, architecture, options.all)]
    print(table(rows))
    failed = sum(bool(row.failures) for row in rows)
    print(f"\n{len(rows)} kernels, {failed} failed; triton {triton.__version__}, torch {torch.__version__}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
