"""Makes a plan: the step as configured, and the largest batches in one graph and by gradient
caching.

Two passes of each part give the line on which its memory and its work lie at other sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch

from simplclip import gradient_cache
from simplclip.common import hardware
from simplclip.common.errors import InputError
from simplclip.plan.cards import CARDS, GIB
from simplclip.plan.meter import Work
from simplclip.plan.step import Pass, Step, planned
from simplclip.train.config import Config, ConfigError
from simplclip.train.step import KEPT_SHARE

SIZES = 128, 512  # pairs of the two passes
SMALL_MICRO_BATCH = 256  # if none is configured
MOST_PAIRS = 1 << 16  # of a largest batch; CLIP was trained with 32,768
# What is assumed to be taken of a device's memory: by the driver and torch's libraries, by cuBLAS
# and cuDNN; and the share of the rest that the allocator loses.
CONTEXT, LIBRARIES, FRAGMENTATION = 640 << 20, 160 << 20, 0.04


def gib(size: float) -> str:
    """Returns a number of bytes as text, "1.50 GiB"."""
    return f"{size / GIB:.2f} GiB"


def usable(memory: int) -> int:
    """Returns the bytes that the tensors of a step may take of a device's memory."""
    return int((memory - CONTEXT - LIBRARIES) * (1 - FRAGMENTATION))


@dataclass(frozen=True)
class Row:
    """A step of a plan. micro_batch: None: the whole batch. peak: bytes of torch's allocator."""

    batch_size: int
    micro_batch: int | None
    peak: int
    works: list[Work] = field(repr=False)


def pick_precision(config: Config, card: str | None) -> str:
    """Returns the precision of a run on a card, by its name in CARDS, or on a recent one."""
    if config.run.precision != "auto":
        return config.run.precision
    return "bf16" if card is None or CARDS[card].triton else "fp32"


class Planner:
    """Predicts the steps of a config, in the context of its `Step`.

    memory: bytes of the device, of which gradient caching may fill a part with outputs.

    Raises ConfigError; InputError if torch is a build without CUDA; an error of torch for a model
    that does not run on fake tensors.
    """

    def __init__(self, config: Config, step: Step, memory: int = 0) -> None:
        """Predicts nothing yet."""
        self.config, self.step, self.memory = config, step, memory
        self._losses: dict[int, tuple[Pass, int]] = {}  # by pairs

    @cached_property
    def cacheable(self) -> bool:
        """Whether the model allows gradient caching."""
        try:
            gradient_cache.check(self.step.model)
        except InputError:
            return False
        return True

    @cached_property
    def _cropped(self) -> list[Pass]:
        return [self.step.encode(size, cropped=True) for size in SIZES]

    @cached_property
    def _full(self) -> list[Pass]:
        if self.step.crops:
            return [self.step.encode(size) for size in SIZES]
        return self._cropped

    def row(self, pairs: int, micro: int | None) -> Row:
        """Predicts a step of so many pairs, `micro` at a time."""
        step = self.step
        encoded = _at(self._cropped if micro is None else self._full, micro or pairs)
        if pairs not in self._losses:
            self._losses[pairs] = step.loss(pairs)
        loss, features = self._losses[pairs]
        if micro is None:
            peak = max(encoded.peak, encoded.kept + loss.peak)
            works = [*encoded.works, *loss.works, *step.updating]
            return Row(pairs, None, max(step.state + peak, step.update), works)
        kept = (pairs - micro) * step.frozen_bytes
        if kept > self.memory / KEPT_SHARE:
            kept = 0
        # all but the last micro-batch are encoded without autograd first; what is frozen, once
        others = pairs // micro - 1
        first = [work._replace(runs=0, times=others) for work in encoded.works]
        again = [work._replace(times=others) for work in encoded.works if work.runs or not kept]
        # features; when a micro-batch is encoded again, also their gradients and those of texts
        second = encoded.kept if kept else encoded.peak
        second += features + step.text_gradients
        peak = kept + features + max(encoded.peak, encoded.kept + loss.peak, second)
        works = [*first, *again, *encoded.works, *loss.works, *step.updating]
        return Row(pairs, micro, max(step.state + round(peak), step.update), works)

    def configured(self) -> Row:
        """Predicts the step as configured; of micro_batch "auto", with the largest that fits."""
        data = self.config.data
        micro = data.micro_batch
        if micro == "auto":
            micro = self.largest_micro_batch(data.batch_size, usable(self.memory))
        return self.row(data.batch_size, micro)

    def largest(self, limit: int, micro: int | None) -> Row | None:
        """Predicts the largest batch of at most `limit` bytes and MOST_PAIRS; None if none fits.

        micro: pairs at a time, of which the batch is a multiple; None: one graph.
        """
        unit = micro or 1
        sizes = (SIZES[0], SIZES[1]) if micro is None else (4 * micro, MOST_PAIRS // micro * micro)
        size = crossing({size: self.row(size, micro).peak for size in sizes}, limit)
        size = min(int(size), MOST_PAIRS) // unit * unit
        while size > 0:
            row = self.row(size, micro)
            if row.peak <= limit:
                return row
            size -= max(unit, size // 50 // unit * unit)
        return None

    def largest_micro_batch(self, size: int, limit: int) -> int | None:
        """Returns the largest micro-batch whose step fits, None if the whole batch fits.

        It is a divisor of `size`. Raises ConfigError if not even the smallest one fits.
        """
        whole = self.row(size, None)
        if whole.peak <= limit:
            return None
        divisors = [n for n in range(size - 1, 0, -1) if size % n == 0] if self.cacheable else []
        for micro in divisors:
            if self.row(size, micro).peak <= limit:
                return micro
        raise ConfigError(
            f"data.micro_batch: expected one that fits {gib(limit)}, got auto; a batch of "
            f"{size:,} takes {gib(whole.peak)}, and does not fit 1 at a time"
        )


def _at(passes: list[Pass], pairs: int) -> Pass:
    """Returns the pass of so many pairs, on the line through two."""
    few, many = passes
    return few.towards(many, (pairs - SIZES[0]) / (SIZES[1] - SIZES[0]))


def crossing(peaks: dict[int, int], limit: int) -> float:
    """Returns the size at which the line through two peaks, {size: bytes}, crosses the limit."""
    (a, low), (b, high) = sorted(peaks.items())
    if high <= low:
        return math.inf if low <= limit else 0.0
    return max(0.0, a + (limit - low) * (b - a) / (high - low))


def largest_micro_batch(config: Config, device: torch.device, ranks: int = 1) -> int | None:
    """Returns the largest data.micro_batch that fits on a device, None for the whole batch.

    ranks: the number of ranks, which share data.batch_size; the texts that a rank gets from the
    others are not counted. Nothing runs on the device. Raises ConfigError if not even one pair at a
    time fits.
    """
    precision, _ = hardware.pick_precision(config.run.precision, device)
    share = config.replaced(
        data={"batch_size": config.data.batch_size // ranks, "micro_batch": None}
    )
    memory = hardware.total_memory(device)
    with planned(share, precision, device.type) as step:
        planner = Planner(share, step, memory)
        return planner.largest_micro_batch(share.data.batch_size, usable(memory))
