"""Table of tile sizes by op, number of matrices, dtype and architecture, without autotuning.

`make aot` compiles every entry and prints registers, shared memory and occupancy; none may spill.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import torch

from simplclip.common.machine import version_of
from simplclip.common.tuned import choices


class Tile(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    blocks: int = 1  # at least so many programs share a multiprocessor; the launcher divides the columns accordingly

    def options(self) -> dict[str, int]:
        return dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"), self))


ARCHITECTURES = (80, 86, 89, 90, 120)
PRECISIONS = ("half", "tf32", "ieee")
INTERPRETER = 0  # its "architecture", with small tiles of three different sides, so that small tests have several tiles

_INTERPRETED = {
    "similarity": Tile(32, 64, 16, 4, 2, 1),
    "parallel_mlp": Tile(32, 64, 16, 4, 2, 1),
}

# A row holds the tiles of an op in a precision: block_m x block_n x block_k / warps / stages, and / blocks unless it is 1.
# similarity_forward, _backward: entry k is for k matrices in a launch. At most two are in registers, with statistics.
# similarity_sigmoid: entry k is for k terms. similarity_forward_sigmoid, _backward_sigmoid: for k terms that join a softmax,
# but entry 3 is for several positives, and entry 2 also for the statistics of rows alone.
# Entries are the largest tiles with which no launch spills.
# fmt: off
_TABLE = {
    ("similarity_forward", "half"):          "128x128x32/8/4 128x64x32/8/4  128x64x32/8/4  64x64x32/8/4",
    ("similarity_forward", "tf32"):          "128x128x16/8/4 128x64x32/8/3  64x128x16/8/4  64x64x32/8/3",
    ("similarity_forward", "ieee"):          "128x64x8/8/4   64x64x16/8/3   64x64x8/8/4    64x64x8/8/4",
    ("similarity_forward_kept", "half"):     "128x128x32/8/4",
    ("similarity_forward_kept", "tf32"):     "128x64x32/8/3",
    ("similarity_forward_kept", "ieee"):     "128x64x8/8/4",
    ("similarity_backward", "half"):         "128x128x32/8/4 128x64x32/8/4  64x128x32/8/4  64x64x32/8/4",
    ("similarity_backward", "tf32"):         "128x128x16/8/4 64x128x16/8/4  64x128x16/8/4  64x64x32/8/3",
    ("similarity_backward", "ieee"):         "128x64x8/8/4   128x32x16/8/3  64x64x8/8/4    64x64x16/8/3",
    ("similarity_forward_sigmoid", "half"):  "128x64x32/8/4  64x64x32/8/4   64x64x32/8/4",
    ("similarity_forward_sigmoid", "tf32"):  "64x64x32/8/3   64x64x16/8/4   64x64x16/8/4",
    ("similarity_forward_sigmoid", "ieee"):  "64x32x8/8/4    64x32x8/8/4    64x64x8/8/4",
    ("similarity_backward_sigmoid", "half"): "128x64x32/8/4  64x128x32/8/4  64x64x32/8/4",
    ("similarity_backward_sigmoid", "tf32"): "64x128x16/8/4  64x128x16/8/4  64x64x32/8/3",
    ("similarity_backward_sigmoid", "ieee"): "128x32x16/8/3  64x64x8/8/4    64x64x8/8/4",
    ("similarity_sigmoid", "half"):          "128x64x32/8/4  64x64x32/8/4",
    ("similarity_sigmoid", "tf32"):          "64x128x16/8/4  64x64x32/8/3",
    ("similarity_sigmoid", "ieee"):          "128x32x16/8/3  64x32x16/4/3",
    ("parallel_mlp_hidden", "half"):         "128x128x32/8/3",
    ("parallel_mlp_hidden", "tf32"):         "128x128x16/8/3",
    ("parallel_mlp_hidden", "ieee"):         "64x64x16/8/3",
}
# Tiles of architectures for which the compiler needs other tiles than for the RTX 3090; "-" is the tile in _TABLE.
_ARCHITECTURE = {
    ("similarity_backward", "tf32", 80):          "128x64x32/8/3",
    ("similarity_sigmoid", "ieee", 80):           "-              64x32x32/4/2",
    ("similarity_sigmoid", "ieee", 90):           "64x64x16/8/3",
    ("similarity_sigmoid", "ieee", 120):          "64x32x16/4/3",
    ("similarity_forward_sigmoid", "half", 80):   "64x64x32/8/4   64x64x32/8/4",
    ("similarity_forward_sigmoid", "half", 90):   "128x64x64/16/3 64x64x32/8/4",
    ("similarity_forward_sigmoid", "tf32", 90):   "-              64x64x32/8/3",
    ("similarity_forward_sigmoid", "ieee", 90):   "-              64x64x8/8/4",
    ("similarity_forward_sigmoid", "half", 120):  "64x64x32/8/4",
    ("similarity_forward_sigmoid", "ieee", 120):  "64x64x8/8/4    64x64x8/8/4",
    ("similarity_backward_sigmoid", "half", 90):  "-              64x64x32/8/4",
    ("similarity_backward_sigmoid", "tf32", 90):  "-              64x64x32/8/3",
    ("similarity_backward_sigmoid", "half", 120): "-              64x32x32/8/4",
    ("similarity_backward_sigmoid", "tf32", 120): "-              128x64x16/8/4  64x64x16/8/4",
    ("similarity_backward_sigmoid", "ieee", 80):  "64x64x16/8/3",
    ("similarity_forward_kept", "half", 90):      "128x128x64/8/3",
    ("similarity_forward_kept", "tf32", 90):      "64x64x32/8/3",
    ("similarity_forward_kept", "half", 120):     "64x64x32/8/4",
    ("similarity_forward_kept", "ieee", 120):     "64x64x8/8/4",
    ("similarity_forward", "half", 90):           "128x128x64/8/3 64x64x32/8/4   64x64x32/8/4",
    ("similarity_forward", "tf32", 90):           "128x64x32/8/3  64x64x32/8/3   64x64x32/8/3",
    ("similarity_backward", "tf32", 90):          "-              -              -              64x64x32/8/3",
    ("similarity_forward", "half", 120):          "-              64x64x32/8/4   -              64x32x32/8/4",
    ("similarity_backward", "half", 90):          "128x128x64/8/3",
    ("similarity_backward", "half", 120):         "-              -              64x32x32/8/4",
    ("similarity_forward", "tf32", 120):          "-              -              -              64x32x32/8/3",
    ("similarity_backward", "tf32", 120):         "-              -              128x64x16/8/4",
    ("similarity_forward", "ieee", 120):          "-              64x64x8/8/4",
}
# A tl.dot of Triton 3.6 and 3.7 (torch 2.11 has 3.6) sums at least 16 products, of 3.8 and 3.9 at least 8 in float32, and the
# older versions spill with other tiles. These entries, for an architecture or (0) for all, precede those above.
_OLDER = {
    ("similarity_forward", "half", 0):          "-              -              64x64x32/8/4",
    ("similarity_forward", "tf32", 0):          "-              -              64x64x32/8/3",
    ("similarity_forward", "ieee", 0):          "64x64x16/8/3   128x32x16/8/3  64x32x16/8/3   64x64x16/8/1",
    ("similarity_forward_kept", "ieee", 0):     "64x64x16/8/3",
    ("similarity_forward_kept", "half", 0):     "128x64x32/8/4",
    ("similarity_forward_kept", "tf32", 120):   "64x64x32/8/3",
    ("similarity_forward_kept", "ieee", 120):   "128x32x16/8/3",
    ("similarity_forward", "ieee", 90):         "64x64x16/8/1",
    ("similarity_forward", "ieee", 120):        "64x64x16/8/1",
    ("similarity_forward", "half", 80):         "128x64x32/8/4",
    ("similarity_forward", "half", 120):        "128x64x32/8/4",
    ("similarity_forward", "tf32", 120):        "128x64x32/8/3  64x64x32/8/3",
    ("similarity_backward", "tf32", 0):         "-              -              -              64x128x16/8/4",
    ("similarity_backward", "tf32", 90):        "-              -              -              64x64x32/8/3",
    ("similarity_backward", "ieee", 0):         "128x64x16/8/3  -              64x64x16/8/3   64x64x16/8/3",
    ("similarity_forward_sigmoid", "half", 0):  "-              64x64x32/8/4",
    ("similarity_forward_sigmoid", "tf32", 0):  "-              64x64x32/8/3",
    ("similarity_forward_sigmoid", "ieee", 0):  "128x32x16/8/3  64x32x16/8/3   64x64x16/8/1",
    ("similarity_forward_sigmoid", "ieee", 90): "-              32x32x16/4/3",
    ("similarity_forward_sigmoid", "ieee", 120):"-              32x32x16/4/3",
    ("similarity_backward_sigmoid", "half", 90):"128x64x64/16/3",
    ("similarity_backward_sigmoid", "tf32", 80): "-              64x64x32/8/3",
    ("similarity_backward_sigmoid", "ieee", 0): "-              64x64x16/8/3   64x64x16/8/3",
    ("similarity_backward_sigmoid", "ieee", 120):"-             -              64x32x16/8/3",
    ("similarity_backward_sigmoid", "tf32", 120):"-              32x128x16/8/4",
    ("similarity_sigmoid", "half", 86):         "-              64x32x32/8/4",
    ("similarity_sigmoid", "half", 89):         "-              64x32x32/8/4",
    ("similarity_sigmoid", "ieee", 80):         "128x32x16/8/2",
    ("similarity_sigmoid", "ieee", 90):         "-              64x32x16/8/3",
}
# A second tile of the hottest entries, those of a single matrix, which `simplclip tune` may choose by measuring.
_SECOND = {
    ("similarity_forward", "half", 86):  "128x64x32/8/4",
    ("similarity_backward", "half", 86): "128x64x32/8/4",
    ("similarity_forward", "half", 89):  "128x64x32/8/4",
    ("similarity_backward", "half", 89): "128x64x32/8/4",
    ("similarity_forward", "half", 90):  "128x64x64/8/3",
    ("similarity_backward", "half", 90): "128x64x64/8/3",
}
TUNED = ("similarity_forward", "similarity_backward")
# fmt: on


def _older() -> bool:
    """Whether the installed Triton is 3.7 or older; False without Triton, e.g. for a plan of another machine."""
    version = version_of("triton")
    return version is not None and tuple(map(int, re.findall(r"\d+", version)[:2])) < (3, 8)


OLDER = _older()


def lookup(op: str, entry: int, precision: str, architecture: int) -> Tile:
    """Returns entry `entry` (from 1) of the op's row, or the second tile if `simplclip tune` chose it by measuring."""
    found = candidates(op, entry, precision, architecture)
    chosen = choices("cuda").get(choice_of(op, entry, precision, architecture)) if len(found) > 1 else None
    return found.get(chosen) or next(iter(found.values()))


def choice_of(op: str, entry: int, precision: str, architecture: int) -> str:
    return f"tile of {op} {entry}, {precision}, sm_{architecture}"


def candidates(op: str, entry: int, precision: str, architecture: int) -> dict[str, Tile]:
    """Returns the tiles that the gates admit, by their text in the tables, the default first.

    An architecture that is not in ARCHITECTURES uses the tiles of the nearest architecture.
    """
    return _candidates(op, entry, precision, architecture, OLDER)


@functools.cache
def _candidates(op: str, entry: int, precision: str, architecture: int, older: bool) -> dict[str, Tile]:
    if architecture == INTERPRETER:
        return {"": _INTERPRETED[max((name for name in _INTERPRETED if op.startswith(name)), key=len)]}
    own = op, precision, min(ARCHITECTURES, key=lambda known: abs(known - architecture))
    rows = [_OLDER.get(own, ""), _OLDER.get((op, precision, 0), "")] if older else []
    cells = (row.split()[entry - 1 : entry] for row in [*rows, _ARCHITECTURE.get(own, ""), _TABLE[op, precision]])
    default = next(cell for found in cells for cell in found if cell != "-")
    second = [_SECOND[own]] if entry == 1 and own in _SECOND else []
    return {cell: Tile(*map(int, re.split("[x/]", cell))) for cell in (default, *second)}


def precision_of(dtype: torch.dtype, tf32: bool) -> str:
    if dtype != torch.float32:
        return "half"
    return "tf32" if tf32 else "ieee"
