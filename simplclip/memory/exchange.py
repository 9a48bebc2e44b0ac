"""Bytes that the ranks exchange in a step, and the time that a link takes to send them. docs/scaling.md has the formula."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import distributed_c10d

# Bytes a second in one direction, as the vendors state them. Each rank has a link of its own.
LINKS = {"PCIe 4.0 x16": 32e9, "NVLink 3": 300e9, "25 Gbit/s": 25e9 / 8, "100 Gbit/s": 100e9 / 8}
COLUMN_STATISTICS = 3  # float32 numbers for each column, see ops/similarity/call.py


@dataclass(frozen=True)
class Exchange:
    """The exchange of k ranks in a step with n pairs each, whose loss has gather_with_grad=True, or local_loss=False.

    terms: names of the terms of simplclip.losses. itemsize: bytes of one number of the features that are sent.
    teacher_width: D̂ if a term has a teacher. ids: whether the loss gets ids. parameters: the count of numbers, in float32,
    whose gradients are averaged.
    """

    ranks: int
    pairs: int
    width: int
    itemsize: int = 4
    terms: tuple[str, ...] = ("contrastive",)
    teacher_width: int = 0
    ids: bool = False
    parameters: int = 0

    def sent(self) -> dict[str, int]:
        """Returns the bytes that a rank sends in a step, by kind of data. The rank receives as many."""
        n, others, terms = self.pairs, self.ranks - 1, set(self.terms)
        there_and_back = 2 * self.width if terms - {"interactive", "feature"} else 0
        teacher = ("relational" in terms) + 2 * ("interactive" in terms)  # texts, and texts and images
        features = n * self.itemsize * (there_and_back + teacher * self.teacher_width)
        softmax = terms & {"contrastive", "relational"}  # other terms need no column statistics
        statistics = 2 * COLUMN_STATISTICS * n * 4 if softmax else 0
        ids = 8 * n * self.ids * ((there_and_back > 0) + ("interactive" in terms))
        sent = {"features": features, "column statistics": statistics, "ids": ids}
        parameters = 2 * 4 * self.parameters * others // self.ranks  # a ring sends the parts of the sums, then the sums
        return {name: others * size for name, size in sent.items()} | {"gradients of parameters": parameters}

    def seconds(self) -> dict[str, float]:
        """Returns the seconds that each link takes for the exchange, if nothing overlaps with it."""
        return {link: sum(self.sent().values()) / rate for link, rate in LINKS.items()}


@contextmanager
def pretended(ranks: int) -> Iterator[None]:
    """Context in which this process is the first of `ranks` ranks, and collectives do nothing.

    At the end, a process group that existed before becomes the default group again.
    """
    if ranks == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore  # torch's test module, which one rank does not need

    exists = dist.group.WORLD if dist.is_initialized() else None
    number = distributed_c10d._world.group_count  # group names contain it, and must be the same on all ranks
    distributed_c10d._update_default_pg(None)
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    fake = dist.group.WORLD
    try:
        yield
    finally:
        distributed_c10d._update_default_pg(exists)
        dist.destroy_process_group(fake)
        distributed_c10d._world.group_count = number
