"""The kernels whose machine code is counted: those of the library with tensor-core instructions,
in bfloat16, as `make aot` compiles and reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.machine_code import sass
from benchmarks.machine_code.pipes import Phase, Prediction, Program, predict
from gates import extension
from gates import kernels as gates
from gates.gate import Row, measure_with_code
from simplclip.kernels.tuning import Tile
from simplclip.ops import backends

ITEMSIZE = 2


@dataclass(frozen=True)
class Case:
    """A Triton kernel in one of its forms."""

    name: str
    function: str
    form: str  # as the gates name it
    moved: int = 0  # bytes of an element of the tile that it reads and writes, besides operands
    products: int = 1


CASES = (
    Case("statistics", "_similarity_statistics_kernel", "Z"),
    Case("statistics, ids", "_similarity_statistics_kernel", "Z+ids"),
    Case("statistics, pair matching", "_similarity_statistics_kernel", "Z+plane"),
    Case("statistics, teacher", "_similarity_statistics_kernel", "Z+teacher", products=2),
    Case("gradient", "_similarity_gradient_kernel", "Z", ITEMSIZE),
    Case("gradient, ids", "_similarity_gradient_kernel", "Z+ids", ITEMSIZE),
    Case("gradient, pair matching", "_similarity_gradient_kernel", "Z+plane", ITEMSIZE),
    Case("gradient, teacher", "_similarity_gradient_kernel", "Z+teacher", ITEMSIZE, products=2),
    Case("sigmoid", "_similarity_sigmoid_kernel", "1 terms gradient", ITEMSIZE),
    Case("sigmoid, ids", "_similarity_sigmoid_kernel", "1 terms+ids gradient", ITEMSIZE),
    Case("sigmoid, two terms", "_similarity_sigmoid_kernel", "2 terms gradient", ITEMSIZE),
    Case("mlp hidden", "_parallel_mlp_hidden_kernel", "gelu", 2 * ITEMSIZE),
)


@dataclass(frozen=True)
class Counted:
    """A kernel's machine code, divided, with what the gates say of it."""

    row: Row
    tile: Tile
    case: Case
    products: list[list[sass.Instruction]]  # the loop of each product
    rest: list[sass.Instruction]  # what else is executed for a tile

    def predicted(self, width: int) -> Prediction:
        """Predicts the kernel for products that sum over `width` numbers."""
        rows, columns = self.tile[:2]
        macs = rows * columns * width
        phases = [Phase(self.rest, 1, rows * columns * self.case.moved)]
        for body in self.products:
            steps = macs / (sass.tensor_macs(body) * self.tile.warps)
            operands = (rows + columns) * width * ITEMSIZE
            phases.append(Phase(body, steps, operands, products=True))
        resources = self.tile.warps, self.tile.stages, self.row.blocks
        program = Program(self.row.architecture, *resources)
        return predict(program, phases, macs * len(self.products))


def kernel_of(case: Case, architecture: int) -> gates.Kernel:
    """Returns what a case compiles, with the table's tile."""
    return next(
        kernel
        for kernel in gates.kernels("bfloat16", architecture, True)
        if (kernel.name, kernel.matrices) == (case.function, case.form)
    )


def compiled(case: Case, architecture: int, tile: Tile | None = None) -> Counted:
    """Returns a case's machine code. tile: replaces the table's."""
    kernel = kernel_of(case, architecture)
    return counted(_with_tile(kernel, tile) if tile else kernel, case, architecture)


def counted(kernel: gates.Kernel, case: Case, architecture: int) -> Counted:
    """Compiles a kernel with a loop for each of its products."""
    row, text = measure_with_code(kernel, architecture)
    (instructions,) = sass.functions(text).values()
    inside = sass.innermost(instructions)
    if len(inside) != case.products:
        raise ValueError(f"{case.name}: expected {case.products} loops, got {len(inside)}")
    rest = sass.without(sass.around(instructions, inside), inside)
    return Counted(row, kernel.tile, case, [loop.body(instructions) for loop in inside], rest)


def _with_tile(kernel: gates.Kernel, tile: Tile) -> gates.Kernel:
    """Returns the kernel with another tile, also in its constants."""
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    if "TILE" in kernel.constants:
        blocks = {"TILE": replace(kernel.constants["TILE"], **blocks)}
    return replace(kernel, tile=tile, constants=kernel.constants | blocks)


# A head of CLIP's text tower. Tensors of a head that are read, and that are read or written.
TOKENS, WIDTH = 77, 64
ATTENTION = {"forward": (3, 4), "backward": (4, 7)}


def attention(architecture: int) -> Iterator[tuple[str, Row, Prediction]]:
    """Yields direction, row and prediction of the CUDA extension's attention kernels."""
    rows = extension.launches(extension.compiled([architecture]))
    codes = sass.functions("".join(extension.dump("-sass", architecture)))
    for direction, (read, moved) in ATTENTION.items():
        start = f"shaped_attention_{direction}_kernel<bf16,"
        names = (symbol for symbol in codes if extension.demangled(symbol).startswith(start))
        instructions = codes[next(names)]
        row = next(r for r in rows if r.kernel.startswith(start) and r.tile == f"{TOKENS}x{WIDTH}")
        plan = backends.cuda_extension.shaped_attention_plan(
            TOKENS, WIDTH, False, direction == "backward"
        )
        products = sass.innermost(instructions)
        bodies = [loop.body(instructions) for loop in products]
        macs = sum(map(sass.tensor_macs, bodies)) * row.warps
        steps = plan["products"] * 256 * WIDTH / macs
        copies = _copies(instructions)
        phases = [Phase(body, steps, products=True) for body in bodies]
        for loop in copies[:read]:  # the others are for wider heads
            body = loop.body(instructions)
            inner = [other for other in sass.loops(body) if loop.has(other)]
            # four threads copy a row
            phases.append(Phase(sass.without(body, inner), TOKENS / (8 * row.warps)))
        rest = sass.without(instructions, products + copies)
        phases.append(Phase(rest, 1, moved * TOKENS * WIDTH * ITEMSIZE))
        useful = extension.PRODUCTS[direction] * TOKENS**2 * WIDTH
        program = Program(architecture, row.warps, 1, row.blocks)
        yield direction, row, predict(program, phases, useful)


def _copies(instructions: list[sass.Instruction]) -> list[sass.Loop]:
    """Returns the outermost loops that copy to shared memory and multiply nothing."""
    found = []
    for loop in sass.loops(instructions):
        body = loop.body(instructions)
        if any(made.family == "LDGSTS" for made in body) and not sass.tensor_macs(body):
            found.append(loop)
    return [loop for loop in found if not any(other.has(loop) for other in found)]
