"""Kernels of others, whose times on cards were published: what the model says of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import triton
import triton.language as tl

from benchmarks.machine_code import sass
from benchmarks.machine_code.kernels import ITEMSIZE, Case, Counted, counted
from benchmarks.machine_code.pipes import Phase, Program, predict
from gates.gate import measure_with_code
from gates.kernels import Kernel
from simplclip.kernels.tuning import Tile
from simplclip.plan.cards import CARDS

MATMUL = Case("matmul", "", "", ITEMSIZE)
# Of Triton's tutorial: the tile for large matrices.
TILE = Tile(128, 256, 64, 8, 3)


@triton.jit
def matmul_kernel(
    left,  # [M, K]
    right,  # [K, N]
    out,  # [M, N]
    m,
    n,
    k,
    left_stride,
    right_stride,
    out_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Writes a block of a product in the form of Triton's tutorial 03, without an activation."""
    program = tl.program_id(0)
    row_blocks, column_blocks = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    first = program // (GROUP * column_blocks) * GROUP
    group = min(row_blocks - first, GROUP)
    within = program % (GROUP * column_blocks)
    row = (first + within % group) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = within // group * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    a = left + (row % m)[:, None] * left_stride + depth[None, :]
    b = right + depth[:, None] * right_stride + (column % n)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, tl.cdiv(k, BLOCK_K)):
        inside = depth < k - step * BLOCK_K
        total = tl.dot(tl.load(a, inside[None, :], 0.0), tl.load(b, inside[:, None], 0.0), total)
        a += BLOCK_K
        b += BLOCK_K * right_stride
    place = out + row[:, None] * out_stride + column[None, :]
    tl.store(place, total.to(tl.float16), (row < m)[:, None] & (column < n)[None, :])


def matmul(architecture: int) -> Counted:
    """Returns the machine code of the tutorial's kernel in float16."""
    types = dict.fromkeys(("left", "right", "out"), "*element")
    constants = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP": 8}
    return counted(
        Kernel(matmul_kernel, constants, TILE, "float16", types=types), MATMUL, architecture
    )


def waves(tiles: int, slots: int) -> float:
    """Returns the share of the slots that are busy until the last tile is done."""
    return tiles / (math.ceil(tiles / slots) * slots)


def matmul_share(card: str, size: int) -> float:
    """Returns the predicted share for square matrices, with the idle slots of the last wave."""
    code = matmul(CARDS[card].architecture)
    tiles = math.ceil(size / TILE.block_m) * math.ceil(size / TILE.block_n)
    slots = CARDS[card].multiprocessors * code.row.blocks
    return code.predicted(size).share * waves(tiles, slots)


def memeff_share(architecture: int, width: int) -> float:
    """Returns the predicted share for the five products of memeff's contrastive loss.

    One is for the denominators. For each side backward computes the similarities again, and the
    gradient.
    """
    try:
        from memeff.clip_loss import clip_fa_grad_kernel
        from memeff.distributed_clip_loss import clip_denom_kernel
    except ImportError:
        raise SystemExit("memeff: expected the package; pip install memeff==0.3.1") from None

    types = dict.fromkeys(("X_ptr", "Y_ptr", "A_ptr", "B_ptr"), "*bf16")
    names = "sum_exp_row_ptr sum_exp_col_ptr div_own_ptr div_other_ptr dA_ptr"
    types |= dict.fromkeys(names.split(), "*fp32")
    types |= dict.fromkeys(("inv_temperature", "grad_scale"), "fp32")
    shared = {"D_MODEL": width, "INPUT_PRECISION": "tf32"}

    tile = Tile(128, 128, 64, 4, 3)  # with Triton's defaults of warps and stages
    blocks = dict(zip(("BLOCK_SIZE_I", "BLOCK_SIZE_J", "BLOCK_SIZE_D"), tile))
    kernel = Kernel(clip_denom_kernel, shared | blocks, tile, "bfloat16", types=types)
    forward = counted(kernel, Case("denominators", "", ""), architecture).predicted(width)

    lanes = 512
    tile = Tile(64, 64, lanes, 8, 2)
    blocks = {"BLOCK_SIZE_I": tile.block_m, "BLOCK_SIZE_J": tile.block_n, "D_POW2": lanes}
    constants = shared | blocks | {"BIDIR": True}
    kernel = Kernel(clip_fa_grad_kernel, constants, tile, "bfloat16", types=types)
    row, text = measure_with_code(kernel, architecture)
    (instructions,) = sass.functions(text).values()
    (loop,) = sass.innermost(instructions)  # over blocks of columns, with both products
    step = Phase(loop.body(instructions), 1, tile.block_n * width * ITEMSIZE, products=True)
    program = Program(architecture, tile.warps, tile.stages, row.blocks)
    backward = predict(program, [step], 2 * tile.block_m * tile.block_n * width)
    return 5 / (1 / forward.share + 4 / backward.share)


@dataclass(frozen=True)
class Published:
    """A time that others published."""

    kernel: str  # "matmul" or "memeff"
    card: str
    size: int  # of the square matrices, or pairs of the loss
    width: int
    tflops: float
    source: str

    def predicted(self) -> float:
        """Returns the share of the data sheet's rate by the model."""
        if self.kernel == "matmul":
            return matmul_share(self.card, self.size)
        return memeff_share(CARDS[self.card].architecture, self.width)


def _loss(size: int, width: int, ms: float) -> tuple[int, int, float]:
    """Returns pairs, width, and TFLOP/s of five products in so many milliseconds."""
    return size, width, 5 * 2 * size**2 * width / ms / 1e9


TRITON = "https://github.com/triton-lang/triton/issues/"
PUBLISHED = (
    Published("matmul", "a100-80", 8192, 8192, 267.4, TRITON + "743"),
    Published("matmul", "a100-80", 4096, 4096, 214.4, TRITON + "743"),
    Published("matmul", "h100", 3072, 3072, 524.7, TRITON + "3672"),
    Published("memeff", "a100-80", *_loss(65536, 512, 201), "README of memeff 0.3.1"),
    Published("memeff", "a100-80", *_loss(131072, 384, 703), "README of memeff 0.3.1"),
)


def rows() -> Iterator[dict[str, object]]:
    """Yields a row for each published time."""
    for each in PUBLISHED:
        measured, predicted = each.tflops / CARDS[each.card].half, each.predicted()
        yield {
            "kernel": each.kernel,
            "card": each.card,
            "size": each.size,
            "D": each.width,
            "measured": round(measured, 3),
            "predicted": round(predicted, 3),
            "measured/predicted": round(measured / predicted, 2),
            "source": each.source,
        }


def calibration(peers: Iterable[Mapping[str, object]]) -> float:
    """Returns the geometric mean of what was measured over what is predicted."""
    ratios = [float(str(row["measured/predicted"])) for row in peers]
    return round(statistics.geometric_mean(ratios), 2)
