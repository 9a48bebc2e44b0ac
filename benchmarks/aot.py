"""Compiles the Triton kernels ahead of time and gates what the compiler made of them; needs no GPU.

    python -m benchmarks.aot                            the launches that fill the registers most, every architecture
    python -m benchmarks.aot --all                      every launch a call can ask for
    python -m benchmarks.aot --arch 86 --dtype bfloat16

Prints a line per kernel: registers, shared memory, stack, spills, blocks per multiprocessor, instructions and tensor-core
instructions; the CUDA extension's kernels (where it is built) and the launches they are planned for in the same table. Exits with
1 if a gate fails.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: interpreted kernels cannot be compiled

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from simplclip.kernels import tuning
from simplclip.kernels.feature_loss import MAX_BLOCK, _feature_loss_bwd_kernel, _feature_loss_fwd_kernel
from simplclip.kernels.feature_loss import tile as feature_tile
from simplclip.kernels.similarity_backward import _similarity_gradient_kernel
from simplclip.kernels.similarity_forward import _similarity_statistics_kernel
from simplclip.kernels.similarity_launch import COMPILE, Launch
from simplclip.kernels.similarity_loss import COUNT, DIAGONAL, GROUP, MERGE
from simplclip.kernels.similarity_merge import (
    _similarity_count_kernel,
    _similarity_diagonal_kernel,
    _similarity_merge_kernel,
)

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KIB = 1024
REGISTERS = 65536  # of a multiprocessor, on every architecture here
# Shared memory of a block and of a multiprocessor (each block takes 1 KiB more), warps and blocks of a multiprocessor.
# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
LIMITS = {
    80: (163 * KIB, 164 * KIB, 64, 32),
    86: (99 * KIB, 100 * KIB, 48, 16),
    89: (99 * KIB, 100 * KIB, 48, 24),
    90: (227 * KIB, 228 * KIB, 64, 32),
    120: (99 * KIB, 100 * KIB, 48, 24),
}
DTYPES = {"bfloat16": ("bf16", "half"), "float16": ("fp16", "half"), "tf32": ("fp32", "tf32"), "float32": ("fp32", "ieee")}
_FEATURES = (
    "image",
    "text",
    "teacher_image",
    "teacher_text",
    "projected_image",
    "projected_text",
    "out",
    "student",
    "d_student",
)
_FLOATS = ("scale", "teacher_scale", "cross_scale", "plane_weight", "plane_bias", "row_parts", "column_parts", "rows")
_FLOATS += ("columns", "grad_rows", "grad_columns", "factors", "sums", "parts", "rows_out", "inv_norms", "grad")
_ALIGNED = ("d", "width", "teacher_width", "out_stride", "plane_stride")  # multiples of 16 in any call worth a table


@dataclass
class Kernel:
    """A specialisation to compile: `constants` by argument name, None among them for a tensor that is not given."""

    name: str
    function: object
    constants: dict[str, object]
    tile: tuning.Tile
    dtype: str
    planes: str = ""
    tensor_cores: bool = True
    floats: tuple[str, ...] = ()  # tensors that are float32 here though another kernel's features bear their name
    numbers: tuple[str, ...] = ("entropy",)  # arguments that are no tensors, in float32; others are integers


@dataclass
class Row:
    """What the compiler made of a kernel for one architecture."""

    kernel: str
    planes: str
    dtype: str
    architecture: int
    tile: str
    registers: int
    shared: int
    stack: int
    spills: int
    warps: int
    blocks: int  # that a multiprocessor holds at a time
    instructions: int
    tensor_core: int
    failures: list[str] = field(default_factory=list)


def launches(everything: bool) -> list[Launch]:
    """Launches by their flags: all that simplclip.kernels.similarity_launch.launches can return, or the heaviest ones."""
    flags = list(itertools.product((True, False), repeat=2)) if everything else [(True, True)]  # columns, ids
    found = []
    for columns, ids in flags:
        both = {"COLUMNS": columns, "IDS": ids}
        for softmax, match, hadamard in itertools.product((True, False), ("", "ALL", "HARD"), (False, True)):
            if (hadamard and not match) or (not softmax and match != "ALL"):
                continue
            z = {"Z": True, "L": hadamard, "SOFTMAX": softmax, **({match: True} if match else {})}
            found.append(Launch(**z, IDS=ids, COLUMNS=columns and softmax))
            if softmax:
                found.append(Launch(**z, T=True, RELATIONAL=True, **both))
                found.append(Launch(**z, T=True, RELATIONAL=True, KL=True, U=True, V=columns, **both))
        found += [Launch(T=True, KL=True, U=True, V=columns, **both), Launch(U=True, IDS=ids)]
    return list(dict.fromkeys(found))


def absent(launch: Launch) -> dict[str, None]:
    """Arguments that a call with this launch alone does not have."""
    names = []
    if not launch.Z:
        names += ["image", "text", "scale"]
    if not (launch.T or launch.U or launch.V):
        names += ["teacher_image", "teacher_text"]
    if not launch.T:
        names += ["teacher_scale"]
    if not (launch.U or launch.V):
        names += ["projected_image", "projected_text", "cross_scale"]
    if not (launch.ALL or launch.HARD):
        names += ["plane_weight", "plane_bias"]
    if not launch.IDS:
        names += ["ids", "text_ids"]
    return dict.fromkeys(names)


def similarity(
    launch: Launch, dtype: str, architecture: int, backward: bool, tile: tuning.Tile | None = None, even: bool = True
) -> Kernel:
    """A launch's large kernel; `tile` in place of the table's."""
    precision = DTYPES[dtype][1]
    op, tiles = ("similarity_backward", launch.gradient_tiles) if backward else ("similarity_forward", launch.tiles)
    tile = tile or tuning.lookup(op, tiles, precision, architecture)
    constants = {
        **absent(launch),
        **launch.constants(),
        "EVEN": even,
        "TEACHER_EVEN": even,
        "PRECISION": "tf32" if precision == "tf32" else "ieee",
        "INTERPRETED": False,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
    }
    if backward:
        scaled = dtype == "float16"
        constants |= {"SCALED": scaled, "ATTEND": launch.tiles == launch.U, **({} if scaled else {"factors": None})}
    else:
        constants |= {**launch.slots(), "GROUP": GROUP, **({} if launch.COLUMNS else {"column_parts": None})}
    match = "+all" * launch.ALL + "+hard" * launch.HARD
    planes = "".join(name for name in "ZLTUV" if getattr(launch, name)) + match + "+ids" * launch.IDS
    planes += "" if launch.COLUMNS or launch.U else " rows"
    function = _similarity_gradient_kernel if backward else _similarity_statistics_kernel
    return Kernel(function.__name__, function, constants, tile, dtype, planes if even else planes + " odd D")


def small_kernels(dtype: str) -> Iterator[Kernel]:
    everything = next(launch for launch in launches(False) if launch.tiles == 5 and launch.HARD)
    tile = tuning.Tile(0, 0, 0, 4, 1, 1)
    for of_rows in (True, False):
        slots = {name: at for name, at in everything.slots().items() if name.endswith("_AT")}
        constants = {**everything.constants_of_merge(of_rows), **slots, "SLOTS": 9, "PREVIOUS": not of_rows, **MERGE}
        yield Kernel(
            "_similarity_merge_kernel", _similarity_merge_kernel, constants, tile, "float32",
            "rows" if of_rows else "columns", False, ("out",),
        )  # fmt: skip
    constants = {"Z": True, "L": True, "T": True, "U": True, "V": True, **DIAGONAL}
    yield Kernel("_similarity_diagonal_kernel", _similarity_diagonal_kernel, constants, tile, dtype, "ZLTUV", False)
    yield Kernel("_similarity_count_kernel", _similarity_count_kernel, dict(COUNT), tile, "int64", "", False)


def feature_loss_kernels(dtype: str) -> Iterator[Kernel]:
    """At widths of a block that holds the row, at the limit of that, and beyond it."""
    for d, smooth in itertools.product((512, MAX_BLOCK, 2 * MAX_BLOCK), (False, True)):
        rows, block, warps = feature_tile(d)
        constants = {"SMOOTH": smooth, "NORMALIZE": True, "WHOLE": d <= block, "ROWS": rows, "BLOCK": block}
        for function in (_feature_loss_fwd_kernel, _feature_loss_bwd_kernel):
            yield Kernel(
                function.__name__, function, constants, tuning.Tile(0, 0, 0, warps, 3, 1), dtype,
                f"D={d}" + " smooth" * smooth, False, numbers=("beta", "scale"),
            )  # fmt: skip


def compile_kernel(kernel: Kernel, architecture: int):
    element = DTYPES.get(kernel.dtype, ("fp32",))[0]
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.function.arg_names):
        if name in kernel.constants:
            signature[name], constants[name] = "constexpr", kernel.constants[name]
            continue
        if name in kernel.numbers:
            signature[name] = "fp32"
        elif name == "teacher":  # stored features
            signature[name] = "*fp16"
        elif name in _FEATURES and name not in kernel.floats:
            signature[name] = f"*{element}"
        elif name in _FEATURES or name in _FLOATS:
            signature[name] = "*fp32"
        elif name in ("ids", "text_ids"):
            signature[name] = "*i64"
        else:
            signature[name] = "i32"
        if signature[name].startswith("*") or name in _ALIGNED:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(kernel.function, signature, constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": kernel.tile.warps, "num_stages": kernel.tile.stages, **COMPILE},
    )


def disassemble(path: Path) -> tuple[str, str]:
    """Resource usage and machine code of a cubin or an extension."""
    return tuple(
        subprocess.run([BIN / "cuobjdump", option, path], capture_output=True, text=True, check=True).stdout
        for option in ("-res-usage", "-sass")
    )


def opcodes(sass: str) -> list[str]:
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.MULTILINE)


def blocks_per_multiprocessor(architecture: int, registers: int, shared: int, warps: int) -> int:
    _, all_shared, all_warps, all_blocks = LIMITS[architecture]
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256 * warps)
    return min(by_registers, all_shared // (shared + KIB), all_warps // warps, all_blocks)


def measure(kernel: Kernel, architecture: int) -> Row:
    """Compiles a kernel and gates it."""
    compiled = compile_kernel(kernel, architecture)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = disassemble(Path(file.name))
    codes = opcodes(sass)
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


def spills_and_tensor_cores(codes: list[str]) -> tuple[int, int]:
    """Instructions that write to or read from the stack, and those of the tensor cores."""
    return (
        sum(code.startswith(("STL", "LDL")) for code in codes),
        sum(code.startswith(("HMMA", "HGMMA", "QMMA", "OMMA")) for code in codes),
    )


def gated(row: Row) -> Row:
    """The row with what every kernel must keep to."""
    limit = LIMITS[row.architecture][0]
    if row.spills or row.stack:
        row.failures.append(f"{row.spills} spill instructions, {row.stack} bytes of stack")
    if row.shared > limit:
        row.failures.append(f"{row.shared} bytes of shared memory, the limit is {limit}")
    return row


def table(rows: list[Row]) -> str:
    head = (
        "kernel",
        "planes",
        "dtype",
        "sm",
        "tile",
        "regs",
        "shared",
        "stack",
        "spills",
        "warps",
        "blocks/SM",
        "SASS",
        "MMA",
        "",
    )
    lines = [head] + [
        (r.kernel, r.planes, r.dtype, r.architecture, r.tile, r.registers, r.shared, r.stack, r.spills, r.warps or "",
         r.blocks or "", r.instructions or "", r.tensor_core, "; ".join(r.failures))
        for r in rows
    ]  # fmt: skip
    widths = [max(len(str(line[i])) for line in lines) for i in range(len(head) - 1)] + [0]
    left = (0, 1, 2, 4, 13)
    return "\n".join(
        "  ".join(str(v).ljust(w) if i in left else str(v).rjust(w) for i, (v, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    )


def kernels(dtype: str, architecture: int, everything: bool) -> Iterator[Kernel]:
    for launch in launches(everything):
        for backward in (False, True):
            yield similarity(launch, dtype, architecture, backward)
            if everything:
                yield similarity(launch, dtype, architecture, backward, even=False)
    yield from small_kernels(dtype)
    if dtype != "tf32":
        yield from feature_loss_kernels(dtype)


def main() -> int:
    from benchmarks import aot_extension as extension  # which builds on this module

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
