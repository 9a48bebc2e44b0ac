"""Table of tile sizes by op, number of planes or width of a head, dtype and architecture, without autotuning.

`make aot` compiles every entry and prints registers, shared memory and occupancy; none may spill.
"""

from __future__ import annotations

import importlib.metadata
import re
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    blocks: int  # at least so many share a multiprocessor; the launcher divides the columns accordingly

    def options(self) -> dict[str, int]:
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


ARCHITECTURES = (80, 86, 89, 90, 120)
PRECISIONS = ("half", "tf32", "ieee")
INTERPRETER = 0  # its "architecture", with small tiles of three different sides, so that small tests have several tiles

_INTERPRETED = {
    "similarity": Tile(32, 64, 16, 4, 2, 1),
    "shaped_attention": Tile(64, 32, 0, 4, 2, 1),
    "shaped_attention_keys": Tile(32, 64, 0, 4, 2, 1),
    "parallel_mlp": Tile(32, 64, 16, 4, 2, 1),
}

# similarity_loss: by the number of planes in a launch (in backward with a scalar hyperplane's). At most two planes are in
# registers at a time, but statistics need registers too. Entries are the largest tiles with which no launch spills.
# shaped_attention by the width of a head, 16, 32, 64, 128, 256 (none in float32); its block_k is that width.
_TABLE: dict[tuple[str, str], tuple[Tile, ...]] = {
    ("similarity_forward", "half"): (
        Tile(128, 128, 32, 8, 4, 1),
        Tile(128, 64, 32, 8, 4, 1),
        Tile(128, 64, 32, 8, 4, 1),
        Tile(64, 64, 32, 8, 4, 1),
        Tile(64, 64, 32, 8, 4, 1),
    ),
    ("similarity_forward", "tf32"): (
        Tile(128, 128, 16, 8, 4, 1),
        Tile(128, 64, 32, 8, 3, 1),
        Tile(64, 128, 16, 8, 4, 1),
        Tile(64, 64, 32, 8, 3, 1),
        Tile(64, 64, 16, 8, 4, 1),
    ),
    ("similarity_forward", "ieee"): (
        Tile(128, 64, 8, 8, 4, 1),
        Tile(64, 64, 16, 8, 3, 1),
        Tile(64, 64, 8, 8, 4, 1),
        Tile(64, 64, 8, 8, 4, 1),
        Tile(64, 64, 8, 8, 4, 1),
    ),
    ("similarity_backward", "half"): (
        Tile(128, 128, 32, 8, 4, 1),
        Tile(128, 64, 32, 8, 4, 1),
        Tile(64, 128, 32, 8, 4, 1),
        Tile(64, 128, 32, 8, 4, 1),
        Tile(64, 64, 32, 8, 4, 1),
    ),
    ("similarity_backward", "tf32"): (
        Tile(128, 128, 16, 8, 4, 1),
        Tile(64, 128, 16, 8, 4, 1),
        Tile(64, 128, 16, 8, 4, 1),
        Tile(64, 128, 16, 8, 4, 1),
        Tile(64, 64, 32, 8, 3, 1),
    ),
    ("similarity_backward", "ieee"): (
        Tile(128, 64, 8, 8, 4, 1),
        Tile(128, 32, 16, 8, 3, 1),
        Tile(64, 64, 8, 8, 4, 1),
        Tile(64, 64, 16, 8, 3, 1),
        Tile(64, 64, 8, 8, 4, 1),
    ),
    ("shaped_attention_fwd", "half"): (
        Tile(128, 64, 0, 4, 3, 2),
        Tile(128, 64, 0, 4, 3, 2),
        Tile(128, 32, 0, 4, 3, 2),
        Tile(128, 32, 0, 8, 2, 1),
        Tile(64, 32, 0, 8, 2, 1),
    ),
    ("shaped_attention_fwd", "tf32"): (
        Tile(128, 32, 0, 8, 2, 1),
        Tile(128, 32, 0, 8, 2, 1),
        Tile(128, 32, 0, 8, 2, 1),
        Tile(64, 32, 0, 8, 2, 1),
    ),
    ("shaped_attention_fwd", "ieee"): (
        Tile(64, 32, 0, 8, 2, 1),
        Tile(32, 32, 0, 8, 2, 1),
        Tile(32, 32, 0, 8, 2, 1),
        Tile(16, 32, 0, 8, 1, 1),
    ),
    ("shaped_attention_rows", "half"): (
        Tile(64, 64, 0, 4, 2, 2),
        Tile(64, 64, 0, 4, 2, 2),
        Tile(64, 64, 0, 4, 2, 2),
        Tile(64, 32, 0, 4, 2, 1),
        Tile(64, 16, 0, 8, 1, 1),
    ),
    ("shaped_attention_rows", "tf32"): (
        Tile(64, 32, 0, 4, 2, 1),
        Tile(64, 32, 0, 4, 2, 1),
        Tile(64, 32, 0, 4, 2, 1),
        Tile(32, 16, 0, 4, 1, 1),
    ),
    ("shaped_attention_rows", "ieee"): (
        Tile(32, 32, 0, 8, 1, 1),
        Tile(32, 32, 0, 8, 2, 1),
        Tile(32, 32, 0, 8, 2, 1),
        Tile(16, 16, 0, 8, 1, 1),
    ),
    ("shaped_attention_keys", "half"): (
        Tile(32, 128, 0, 4, 2, 2),
        Tile(32, 128, 0, 4, 2, 2),
        Tile(32, 64, 0, 4, 2, 2),
        Tile(32, 64, 0, 8, 2, 1),
        Tile(16, 32, 0, 4, 1, 1),
    ),
    ("shaped_attention_keys", "tf32"): (
        Tile(32, 64, 0, 8, 2, 1),
        Tile(32, 64, 0, 8, 2, 1),
        Tile(32, 32, 0, 4, 2, 1),
        Tile(32, 32, 0, 4, 1, 1),
    ),
    ("shaped_attention_keys", "ieee"): (
        Tile(32, 32, 0, 8, 1, 1),
        Tile(32, 32, 0, 8, 1, 1),
        Tile(16, 32, 0, 8, 1, 1),
        Tile(16, 32, 0, 8, 1, 1),
    ),
    ("parallel_mlp_fwd", "half"): (Tile(128, 128, 32, 8, 3, 1),),
    ("parallel_mlp_fwd", "tf32"): (Tile(128, 128, 32, 8, 3, 1),),
    ("parallel_mlp_fwd", "ieee"): (Tile(64, 64, 8, 8, 3, 1),),
    ("parallel_mlp_weight", "half"): (Tile(128, 128, 32, 8, 3, 1),),
    ("parallel_mlp_weight", "tf32"): (Tile(128, 128, 16, 8, 3, 1),),
    ("parallel_mlp_weight", "ieee"): (Tile(64, 64, 16, 8, 3, 1),),
    ("parallel_mlp_hidden", "half"): (Tile(128, 128, 32, 8, 3, 1),),
    ("parallel_mlp_hidden", "tf32"): (Tile(128, 128, 16, 8, 3, 1),),
    ("parallel_mlp_hidden", "ieee"): (Tile(64, 64, 16, 8, 3, 1),),
}
# Tiles of architectures whose compiler needs others than that of the RTX 3090.
_ARCHITECTURE: dict[tuple[str, str, int, int], Tile] = {
    ("similarity_backward", "tf32", 1, 80): Tile(128, 64, 32, 8, 3, 1),
    ("similarity_forward", "half", 1, 90): Tile(128, 64, 32, 8, 4, 1),
    ("similarity_forward", "half", 2, 90): Tile(64, 64, 32, 8, 4, 1),
    ("similarity_forward", "half", 3, 90): Tile(64, 64, 32, 8, 4, 1),
    ("similarity_backward", "half", 4, 90): Tile(64, 64, 32, 8, 4, 1),
    ("similarity_forward", "tf32", 1, 90): Tile(128, 64, 32, 8, 3, 1),
    ("similarity_forward", "tf32", 2, 90): Tile(64, 64, 32, 8, 3, 1),
    ("similarity_forward", "tf32", 3, 90): Tile(64, 64, 32, 8, 3, 1),
    ("similarity_backward", "tf32", 4, 90): Tile(64, 64, 32, 8, 3, 1),
    ("similarity_forward", "half", 2, 120): Tile(64, 64, 32, 8, 4, 1),
    ("similarity_forward", "half", 4, 120): Tile(64, 32, 32, 8, 4, 1),
    ("similarity_forward", "half", 5, 120): Tile(64, 32, 32, 8, 4, 1),
    ("similarity_backward", "half", 3, 120): Tile(64, 32, 32, 8, 4, 1),
    ("similarity_forward", "tf32", 4, 120): Tile(64, 32, 32, 8, 3, 1),
    ("similarity_forward", "tf32", 5, 120): Tile(64, 32, 32, 8, 3, 1),
    ("similarity_backward", "tf32", 3, 120): Tile(128, 64, 16, 8, 4, 1),
    ("similarity_forward", "ieee", 2, 120): Tile(64, 64, 8, 8, 4, 1),
    ("shaped_attention_rows", "half", 2, 80): Tile(64, 32, 0, 4, 2, 1),
    ("shaped_attention_keys", "half", 3, 80): Tile(32, 128, 0, 8, 2, 1),
    ("shaped_attention_rows", "half", 5, 90): Tile(64, 16, 0, 4, 1, 1),
    ("shaped_attention_fwd", "half", 4, 120): Tile(64, 64, 0, 8, 2, 1),
    ("shaped_attention_rows", "half", 4, 120): Tile(64, 32, 0, 8, 2, 1),
    ("shaped_attention_fwd", "tf32", 1, 80): Tile(64, 32, 0, 4, 2, 1),
    ("shaped_attention_fwd", "tf32", 2, 80): Tile(64, 32, 0, 4, 2, 1),
    ("shaped_attention_keys", "tf32", 3, 80): Tile(32, 32, 0, 4, 1, 1),
    ("shaped_attention_rows", "ieee", 3, 80): Tile(32, 32, 0, 8, 1, 1),
    ("shaped_attention_fwd", "ieee", 1, 90): Tile(32, 32, 0, 8, 1, 1),
    ("shaped_attention_fwd", "ieee", 2, 120): Tile(64, 32, 0, 8, 2, 1),
    ("shaped_attention_keys", "ieee", 2, 120): Tile(32, 32, 0, 8, 2, 1),
}
# A tl.dot of Triton 3.6 and 3.7 (torch 2.11 has 3.6) sums at least 16 products, one of 3.8 and 3.9 sums 8 in float32; and the
# older versions spill with other tiles. These entries, by architecture or, with 0, for all, precede the others.
_OLDER: dict[tuple[str, str, int, int], Tile] = {
    ("similarity_forward", "half", 3, 0): Tile(64, 64, 32, 8, 4, 1),
    ("similarity_forward", "tf32", 3, 0): Tile(64, 64, 32, 8, 3, 1),
    ("similarity_forward", "ieee", 1, 0): Tile(128, 64, 16, 8, 2, 1),
    ("similarity_forward", "ieee", 2, 0): Tile(128, 32, 16, 8, 3, 1),
    ("similarity_forward", "ieee", 3, 0): Tile(64, 32, 16, 8, 3, 1),
    ("similarity_forward", "ieee", 4, 0): Tile(64, 64, 16, 8, 1, 1),
    ("similarity_forward", "ieee", 5, 0): Tile(64, 64, 16, 8, 1, 1),
    ("similarity_backward", "ieee", 1, 0): Tile(128, 64, 16, 8, 3, 1),
    ("similarity_backward", "ieee", 3, 0): Tile(64, 64, 16, 8, 3, 1),
    ("similarity_backward", "ieee", 5, 0): Tile(64, 64, 16, 8, 3, 1),
    ("shaped_attention_rows", "half", 4, 120): Tile(32, 32, 0, 4, 2, 1),
    ("shaped_attention_fwd", "ieee", 3, 80): Tile(32, 64, 0, 8, 2, 1),
    ("shaped_attention_rows", "ieee", 3, 90): Tile(32, 16, 0, 8, 2, 1),
    ("shaped_attention_keys", "ieee", 3, 80): Tile(16, 32, 0, 8, 2, 1),
    ("parallel_mlp_fwd", "ieee", 1, 0): Tile(64, 64, 16, 8, 3, 1),
}


def _older() -> bool:
    """Whether the installed Triton is 3.7 or older; False without Triton, e.g. for a plan of another machine."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(map(int, re.findall(r"\d+", version)[:2])) < (3, 8)


OLDER = _older()


def lookup(op: str, entry: int, precision: str, architecture: int) -> Tile:
    """Entry `place` (from 1) of the op's list; an architecture without its own entries uses those of the table."""
    if architecture == INTERPRETER:
        return _INTERPRETED.get(op) or _INTERPRETED[op.rpartition("_")[0]]
    if OLDER:
        for key in ((op, precision, entry, architecture), (op, precision, entry, 0)):
            if key in _OLDER:
                return _OLDER[key]
    return _ARCHITECTURE.get((op, precision, entry, architecture)) or _TABLE[op, precision][entry - 1]


def of_width(op: str, width: int, precision: str, architecture: int) -> Tile:
    """The tile of an attention kernel for heads of a width that is a power of two from 16 to 256."""
    return lookup(op, width.bit_length() - 4, precision, architecture)._replace(block_k=width)


def precision_of(dtype: torch.dtype, tf32: bool) -> str:
    if dtype != torch.float32:
        return "half"
    return "tf32" if tf32 else "ieee"
