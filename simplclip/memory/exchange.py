"""What the ranks of a step exchange: bytes, and the time that a link takes for them. docs/scaling.md explains the formula."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import distributed_c10d

# Bytes a second in one direction, as on the box: a link of its own for each rank.
LINKS = {"PCIe 4.0 x16": 32e9, "NVLink 3": 300e9, "25 Gbit/s": 25e9 / 8, "100 Gbit/s": 100e9 / 8}
COLUMN_STATISTICS = 5  # float32 numbers of a column, see ops/similarity/call.py


@dataclass(frozen=True)
class Exchange:
    """A step of k ranks with n pairs each, whose loss has gather_with_grad=True, or local_loss=False.

    terms: of ops.similarity_loss and "feature". itemsize: bytes of a number of the features when they travel.
    teacher_width: D̂ if a term has a teacher. interactive: that term's form. projected: whether the student's features are
    projected to that width.
    ids: whether the loss gets ids. parameters: the numbers, in float32, whose gradients are averaged.
    """

    ranks: int
    pairs: int
    width: int
    itemsize: int = 4
    terms: tuple[str, ...] = ("contrastive",)
    teacher_width: int = 0
    interactive: str = "infonce"
    projected: bool = False
    ids: bool = False
    parameters: int = 0

    def sent(self) -> dict[str, int]:
        """The bytes that a rank sends in a step, and receives, by what they are."""
        n, others, terms = self.pairs, self.ranks - 1, set(self.terms)
        kl = "interactive" in terms and self.interactive == "kl"
        teacher = bool(terms & {"relational", "interactive"}) + ("interactive" in terms and not kl)  # texts, and images
        there_and_back = self.width + (kl and self.projected) * self.teacher_width
        features = n * self.itemsize * (2 * there_and_back + teacher * self.teacher_width)
        swept = kl or terms & {"contrastive", "relational"}  # the others need no column statistics
        statistics = 2 * COLUMN_STATISTICS * n * 4 if swept else 0
        sent = {"features": features, "column statistics": statistics, "ids": 8 * n * self.ids}
        parameters = 2 * 4 * self.parameters * others // self.ranks  # a ring sends what it sums, then the sums
        return {name: others * size for name, size in sent.items()} | {"gradients of parameters": parameters}

    def seconds(self) -> dict[str, float]:
        """The time of the exchange by link, if nothing else happens meanwhile."""
        return {link: sum(self.sent().values()) / rate for link, rate in LINKS.items()}


@contextmanager
def pretended(ranks: int) -> Iterator[None]:
    """A context in which this process is the first of so many ranks, whose collectives do nothing.

    A process group that exists is the default one again afterwards.
    """
    if ranks == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore  # training imports this file, but pretends nothing

    exists = dist.group.WORLD if dist.is_initialized() else None
    number = distributed_c10d._world.group_count  # names of groups must be the same on all ranks
    distributed_c10d._update_default_pg(None)
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    fake = dist.group.WORLD
    try:
        yield
    finally:
        distributed_c10d._update_default_pg(exists)
        dist.destroy_process_group(fake)
        distributed_c10d._world.group_count = number
