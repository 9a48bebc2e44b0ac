"""Tiles of the kernels that multiply matrices, by kernel and precision, without autotuning.

`make aot` compiles every kernel with its tile and prints registers, shared memory and occupancy;
none may spill.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Tiling:
    """The constants with which a kernel computes a tile of a product."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    EVEN: bool  # the widths are multiples of BLOCK_K
    PRECISION: str  # tl.dot's input_precision


class Tile(NamedTuple):
    """Blocks, warps and pipeline stages of a kernel that multiplies matrices, [m, k] by [k, n]."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    # at least so many programs share a multiprocessor; of statistics exactly so many, since forward
    # divides the columns accordingly
    blocks: int = 1
    # of a thread at most; without a limit ptxas spills a few where more programs fit then
    registers: int | None = None

    def options(self) -> dict[str, int | None]:
        """Returns a launch's options num_warps, num_stages and maxnreg by name."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}

    def tiling(self, precision: str, *widths: int) -> Tiling:
        """Returns the constants for a precision and products over so many columns."""
        even = all(width % self.block_k == 0 for width in widths)
        return Tiling(*self[:3], even, "tf32" if precision == "tf32" else "ieee")


PRECISIONS = ("half", "tf32", "ieee")


# By words: the architecture, the precision, the kernel (statistics, gradient, sigmoid or
# parallel_mlp), and what its call has (teacher, plane, ids). A launch has the tile of the first
# line whose words all fit it. Two programs share a multiprocessor where they can: one multiplies
# while the other computes exponentials. Large tiles read less from the L2 cache, but some forms
# spill with them.
_TILES = {
    "sm_90 half statistics teacher": Tile(128, 64, 64, 8, 2),  # three stages spill
    "sm_90 half statistics plane": Tile(64, 64, 64, 4, 5, 2, registers=248),
    "sm_90 half statistics ids": Tile(64, 128, 64, 4, 4, 2, registers=248),
    "sm_90 half statistics": Tile(128, 128, 32, 4, 4, 2),
    "sm_90 half gradient teacher": Tile(64, 64, 64, 4, 3, 2, registers=248),
    "sm_90 half gradient plane": Tile(64, 64, 64, 4, 3, 2, registers=248),
    "sm_90 half gradient": Tile(64, 128, 64, 4, 4, 2, registers=248),
    "sm_90 half sigmoid": Tile(64, 64, 64, 4, 3, 2, registers=248),
    "sm_90 half parallel_mlp": Tile(128, 64, 64, 4, 3, 2),
    "sm_80 half statistics plane ids": Tile(64, 128, 32, 4, 3, 2, registers=248),
    "sm_120 half parallel_mlp": Tile(64, 128, 32, 4, 3, 2),  # gelu spills in 128 x 64
    "half parallel_mlp": Tile(128, 64, 32, 4, 4, 2),
    "half teacher": Tile(64, 64, 32, 4, 4, 2, registers=248),
    "half sigmoid": Tile(64, 64, 32, 4, 4, 2, registers=248),
    "half": Tile(128, 64, 32, 4, 3, 2, registers=248),
    "tf32 parallel_mlp": Tile(128, 128, 16, 8, 3),
    "sm_90 tf32 statistics": Tile(64, 64, 16, 16, 3, registers=128),  # four warps spill
    "sm_90 tf32": Tile(64, 64, 16, 8, 3),
    "tf32 gradient plane": Tile(64, 64, 16, 4, 4, 2, registers=248),  # 128 x 64 spills
    "tf32 teacher": Tile(64, 64, 16, 4, 4, 2, registers=248),
    "tf32 sigmoid": Tile(64, 64, 16, 4, 4, 2, registers=248),
    "tf32": Tile(128, 64, 16, 4, 3, 2, registers=248),
    "ieee statistics teacher": Tile(64, 64, 16, 16, 3, registers=128),
    "ieee statistics plane": Tile(64, 64, 16, 16, 3, registers=128),
    "ieee statistics": Tile(64, 64, 16, 8, 3, 2, registers=128),
    "ieee": Tile(64, 64, 16, 8, 3, registers=248),
}


@functools.cache
def lookup(precision: str, architecture: int, kernel: str, *parts: str) -> Tile:
    """Returns the tile of a kernel on a GPU: that of the first line whose words all fit. Cached.

    precision: "half", "tf32" or "ieee". architecture: e.g. 90. kernel: "statistics", "gradient",
    "sigmoid" or "parallel_mlp". parts: those of "teacher", "plane" and "ids" that the call has.
    """
    words = {precision, f"sm_{architecture}", kernel, *parts}
    return next(tile for line, tile in _TILES.items() if words.issuperset(line.split()))
