"""The gates that a kernel's machine code must pass on each architecture, the table of all kernels,
and the measurement of a compiled kernel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import triton

from gates.kernels import Kernel, kernels

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KIB = 1024
REGISTERS = 65536  # registers of a multiprocessor, the same on every architecture here
# Limits: shared memory of a block and of a multiprocessor (a block takes 1 KiB more), warps and
# blocks of a multiprocessor. CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability".
LIMITS = {
    80: (163 * KIB, 164 * KIB, 64, 32),
    86: (99 * KIB, 100 * KIB, 48, 16),
    89: (99 * KIB, 100 * KIB, 48, 24),
    90: (227 * KIB, 228 * KIB, 64, 32),
    120: (99 * KIB, 100 * KIB, 48, 24),
}
# Kernels that write a matrix. A thread that stores its elements one at a time writes parts of
# sectors: several times as many bytes.
MATRIX_WRITERS = (
    "_similarity_gradient_kernel",
    "_similarity_sigmoid_kernel",
    "_parallel_mlp_activate_kernel",
    "_parallel_mlp_hidden_kernel",
)


@dataclass
class Row:
    """The results of the compiler for a kernel on one architecture."""

    kernel: str
    call: str
    dtype: str
    architecture: int
    tile: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spills: int = 0
    warps: int = 0
    blocks: int = 0  # blocks that a multiprocessor can hold at a time
    instructions: int = 0
    tensor_core: int = 0
    failures: list[str] = field(default_factory=list)


# Matches the instruction's name in a line of cuobjdump -sass.
OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


def blocks_per_multiprocessor(architecture: int, registers: int, shared: int, warps: int) -> int:
    _, all_shared, all_warps, all_blocks = LIMITS[architecture]
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256 * warps)
    return min(by_registers, all_shared // (shared + KIB), all_warps // warps, all_blocks)


def spills_and_tensor_cores(codes: list[str]) -> tuple[int, int]:
    """Counts the instructions that access the stack, and those of the tensor cores."""
    return (
        sum(code.startswith(("STL", "LDL")) for code in codes),
        sum(code.startswith(("HMMA", "HGMMA", "QMMA", "OMMA")) for code in codes),
    )


def gated(row: Row) -> Row:
    """Returns the row with the failures of the gates for every kernel."""
    limit = LIMITS[row.architecture][0]
    if row.spills or row.stack:
        row.failures.append(f"{row.spills} spill instructions, {row.stack} bytes of stack")
    if row.shared > limit:
        row.failures.append(f"{row.shared} bytes of shared memory, the limit is {limit}")
    return row


def disassemble(path: Path) -> tuple[str, str]:
    """Returns resource usage and machine code of a cubin or an extension."""
    return tuple(
        subprocess.check_output([BIN / "cuobjdump", option, path], text=True)
        for option in ("-res-usage", "-sass")
    )


def measure(kernel: Kernel, architecture: int) -> Row:
    """Gates a compiled kernel."""
    compiled, tile = kernel.compiled, kernel.tile
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = disassemble(Path(file.name))
    codes = OPCODE.findall(sass)
    name = compiled.name.removeprefix("_").removesuffix("_kernel")
    shape = f"{'x'.join(map(str, tile[:3]))}/{tile.stages}" if tile else ""
    row = Row(name, kernel.call, kernel.kind, architecture, shape)
    row.registers, row.stack = (
        int(re.search(rf"{each}:(\d+)", usage)[1]) for each in ("REG", "STACK")
    )
    row.shared, row.warps = compiled.metadata.shared, compiled.metadata.num_warps
    row.spills, row.tensor_core = spills_and_tensor_cores(codes)
    row.instructions = len(codes)
    resources = row.registers, row.shared, row.warps
    row.blocks = blocks_per_multiprocessor(architecture, *resources)
    planned = tile.blocks if tile else 1
    # forward divides columns by the number
    more = row.blocks > planned and name == "similarity_statistics"
    if row.blocks < planned or more:
        row.failures.append(f"{row.blocks} blocks per multiprocessor, planned {planned}")
    if tile and kernel.kind != "fp32" and not row.tensor_core:
        row.failures.append("no tensor-core instructions")
    writes_matrix = compiled.name in MATRIX_WRITERS and kernel.launch.named.get("GRADIENT", True)
    if writes_matrix and "STG.E.128" not in codes:
        row.failures.append("no store of 16 bytes")
    return gated(row)


def measure_all(architecture: int, kind: str) -> list[Row]:
    return [measure(kernel, architecture) for kernel in kernels(kind, architecture)]


def table(rows: list[Row]) -> str:
    head = ["kernel", "call", "dtype", "sm", "tile", "regs", "shared", "stack", "spills"]
    head += ["warps", "blocks/SM", "SASS", "MMA", ""]
    lines = [head]
    for row in rows:
        cells = asdict(row) | {"failures": "; ".join(row.failures)}
        for name in ("warps", "blocks", "instructions"):
            cells[name] = cells[name] or ""
        lines.append(list(cells.values()))
    widths = [max(len(str(line[i])) for line in lines) for i in range(len(head) - 1)] + [0]
    left = (0, 1, 2, 4, 13)
    return "\n".join(
        "  ".join(
            str(v).ljust(w) if i in left else str(v).rjust(w)
            for i, (v, w) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )
