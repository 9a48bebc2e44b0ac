"""Gates for the machine code of the CUDA extension's kernels, and for the launches that are planned
for them.

shaped_attention's dynamic shared memory, threads and padded work come from the plan that its
launcher follows.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from gates.gate import BIN, OPCODE, Row, blocks_per_multiprocessor, gated, spills_and_tensor_cores
from simplclip.ops import backends

TOKENS = (50, 64, 77, 80)  # tokens of CLIP's towers, and the most that the kernels take
WIDTHS = (32, 64, 80, 96, 128)
TYPES = ("bf16", "f16", "tf32")
PRODUCTS = {"forward": 2, "backward": 5}  # [L, L, K] products of attention itself
# The text tower in 16 bits (77 tokens, width 64), for which the kernels have to be fast.
TEXT_TOWER = {"tokens": 77, "width": 64, "resident": 2, "padding": 1.12}


@dataclass
class Compiled:
    """Machine code of a kernel for one architecture."""

    name: str  # without its namespace, `kernel<type, sizes>` if it is an instantiation
    registers: int
    stack: int
    shared: int  # static
    opcodes: Counter[str]


def why_not() -> str | None:
    """Returns why there is no extension to gate, or None."""
    return backends.cuda_extension_error


def built() -> set[int]:
    """The architectures that this machine's build has machine code for."""
    parts = backends.cuda_extension.architectures().split(";")
    return {int(part.split("+")[0].replace(".", "")) for part in parts}


def demangled(symbol: str) -> str:
    name, arguments = re.search(r"\d([a-z_]+_kernel)(.*)", symbol).groups()
    match = re.match(r"I(?:NS\d_\d(\w+?)E)?((?:Li\d+E)*)E", arguments)
    if not match:
        return name
    sizes = re.findall(r"Li(\d+)", match[2])
    return f"{name}<{', '.join([match[1], *sizes])}>"


def dump(option: str, architecture: int) -> Iterable[str]:
    where = ["-arch", f"sm_{architecture}", backends.cuda_extension.__file__]
    command = [BIN / "cuobjdump", option, *where]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield from process.stdout
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def compiled(architectures: Iterable[int]) -> dict[int, list[Compiled]]:
    """Returns the kernels of each architecture."""
    kernels_of = {}
    for architecture in architectures:
        codes: dict[str, Counter[str]] = {}
        counter: Counter[str] = Counter()
        for line in dump("-sass", architecture):
            instruction = OPCODE.match(line)
            if instruction:
                counter[instruction[1]] += 1
            elif "Function : " in line:
                counter = codes[line.split()[-1]] = Counter()
        usage = "".join(dump("-res-usage", architecture))
        found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
        kernels_of[architecture] = [
            Compiled(demangled(symbol), *map(int, numbers), codes[symbol])
            for symbol, *numbers in found
        ]
    return kernels_of


def row(kernel: Compiled, architecture: int, dtype: str = "", **planned) -> Row:
    """Returns a kernel's row. planned: tile, shared and warps of a launch."""
    row = Row(kernel.name, "", dtype, architecture, ".cu", kernel.registers, kernel.shared)
    row = replace(row, stack=kernel.stack, instructions=kernel.opcodes.total(), **planned)
    row.spills, row.tensor_core = spills_and_tensor_cores(list(kernel.opcodes.elements()))
    if row.warps:
        resources = row.registers, row.shared, row.warps
        row.blocks = blocks_per_multiprocessor(architecture, *resources)
    return gated(row)


def rows(kernels_of: dict[int, list[Compiled]]) -> list[Row]:
    """Returns a row for each kernel."""
    return [row(kernel, sm) for sm, kernels in kernels_of.items() for kernel in kernels]


def padding(plan: dict, direction: str, tokens: int) -> float:
    """Returns the planned launch's work over attention's own, both without causal mask."""
    return plan["products"] * 256 / (PRODUCTS[direction] * tokens**2)


def launches(kernels_of: dict[int, list[Compiled]]) -> list[Row]:
    """Returns the planned launches, each with its kernel's registers."""
    results = []
    for architecture, tokens, width, dtype, direction in itertools.product(
        kernels_of, TOKENS, WIDTHS, TYPES, PRODUCTS
    ):
        if backends.cuda_extension.shaped_attention_why_not(tokens, width, dtype == "tf32"):
            continue
        plan = backends.cuda_extension.shaped_attention_plan(
            tokens, width, dtype == "tf32", direction == "backward"
        )
        start = f"shaped_attention_{plan['kernel']}_kernel<{dtype},"
        kernel = next(k for k in kernels_of[architecture] if k.name.startswith(start))
        resources = {"shared": plan["shared"] or kernel.shared, "warps": plan["threads"] // 32}
        result = row(kernel, architecture, dtype, tile=f"{tokens}x{width}", **resources)
        fail, blocks = result.failures.append, f"{result.blocks} blocks per multiprocessor"
        if result.blocks < plan["resident"] or not plan["resident"]:
            fail(f"{blocks}, planned {plan['resident']}")
        if not result.tensor_core:
            fail("no tensor-core instructions")
        text_tower = (tokens, width) == (TEXT_TOWER["tokens"], TEXT_TOWER["width"])
        if text_tower and dtype != "tf32":
            if result.blocks < TEXT_TOWER["resident"]:
                fail(f"fewer than {TEXT_TOWER['resident']} blocks per multiprocessor")
            work = padding(plan, direction, tokens)
            if work > TEXT_TOWER["padding"]:
                fail(f"{work:.2f} times attention's work")
        results.append(result)
    return results
