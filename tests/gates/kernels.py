"""The Triton kernels that the launchers start on a card, compiled for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget

from simplclip.kernels import tuning
from support.kernels.calls import CALLS
from support.kernels.launched import Launched, launches_of

PRECISIONS = {"bf16": "half", "fp16": "half", "tf32": "tf32", "fp32": "ieee"}
# the kernels that multiply matrices, by their names in the table of tiles
TILED = {
    "_similarity_statistics_kernel": "statistics",
    "_similarity_gradient_kernel": "gradient",
    "_similarity_sigmoid_kernel": "sigmoid",
    "_parallel_mlp_hidden_kernel": "parallel_mlp",
}
# parts of a call in the table of tiles, and the argument that is None without one
PARTS = {"teacher": "teacher_image", "plane": "plane", "ids": "ids"}
# Multiples of 16 in each call that the table is made for. With others a thread loads and stores few
# bytes at a time, and some kernels spill.
ALIGNED = ("width", "teacher_width", "hidden", "count")
ALIGNED += ("h_stride", "weight_stride", "grad_stride")


class Kernel(NamedTuple):
    launch: Launched
    compiled: Any  # by Triton
    call: str  # the first one that starts it
    kind: str
    tile: tuning.Tile | None


class Compiler:
    """In place of Triton's driver: names the card that Triton compiles for."""

    def __init__(self, sm: int):
        self.sm = sm

    def get_current_device(self) -> tuple[str, int]:
        return "gates", self.sm  # a place of its own in Triton's caches

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.sm, 32)


def tile_of(launch: Launched, kind: str, sm: int) -> tuning.Tile | None:
    """Returns the tile that a launch must have, None for a kernel without tiles."""
    kernel = TILED.get(launch.kernel.__name__)
    if kernel is None:
        return None
    parts = [part for part, name in PARTS.items() if launch.named.get(name) is not None]
    return tuning.lookup(PRECISIONS[kind], sm, kernel, *parts)


def kernels(kind: str, sm: int, calls: Iterable[str] = CALLS) -> list[Kernel]:
    """Returns every kernel that calls in a dtype (a key of KINDS) start on a card.

    A launch whose sizes are not ALIGNED is left out.
    """
    found: dict[str, Kernel] = {}
    driver = triton.runtime.driver
    for name in calls:
        launches = launches_of(name, kind, sm)
        before = driver._active
        driver.set_active(Compiler(sm))
        try:
            for launch in launches:
                if any(launch.named.get(each, 0) % 16 for each in ALIGNED):
                    continue
                compiled = launch.kernel.warmup(*launch.args, grid=(1,), **launch.options)
                tile = tile_of(launch, kind, sm)
                found.setdefault(compiled.hash, Kernel(launch, compiled, name, kind, tile))
        finally:
            driver._active = before
    return list(found.values())
