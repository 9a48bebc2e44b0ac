"""The samples of tars in stored order, prepared by several processes: for evaluation, and for the
writers of sidecars.

Every worker goes over all samples, and prepares the batches b with b % workers equal to its number.
So the order does not depend on the number of workers, and no process waits for the one that has the
next tar. To writers the order of tars does not matter: each worker reads tars of its own, if there
are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Generic, NamedTuple, TypeVar

from simplclip.data.errors import BrokenSample, Skipped
from simplclip.data.find_sources import Address, Source
from simplclip.data.samples import Sample, described
from simplclip.data.workers import from_workers

Prepared = TypeVar("Prepared")
Collated = TypeVar("Collated")


class Portion(NamedTuple, Generic[Collated]):
    """A batch of one source, or the end of a source."""

    source: int  # its index
    keys: list[str]  # of the batch's usable samples
    # from `collate`; None at the end of a source, and if no sample of the batch is usable
    batch: Collated | None
    skipped: Skipped  # damage in the batch; at the end of a source that of the tar itself
    end: bool = False  # whether the source ends here


@dataclass
class StoredOrder(Generic[Prepared, Collated]):
    """Samples in stored order. Batches do not go over the end of a source.

    prepare: function of a sample, in a worker, which has its position among all samples that the
    worker reads under "__position__"; it may raise BrokenSample. collate: function of a list of
    prepared samples, in a worker. rank, world_size: this rank makes every `world_size`-th portion.
    """

    sources: Sequence[Source]
    read: Callable[[Source, Skipped], Iterator[Sample]]
    prepare: Callable[[Sample], Prepared]
    batch_size: int
    collate: Callable[[list[Prepared]], Collated]
    rank: int = 0
    world_size: int = 1
    # whether workers divide the sources, if there are enough; only the batches of each source are
    # then in order
    divide_sources: bool = False

    def portions(self, workers: int = 0) -> Generator[Portion[Collated], None, None]:
        """Yields this rank's portions, made by `workers` processes; 0 makes them in this process.

        The processes start with the first portion, and end with the generator.
        """
        if any(isinstance(source.url, Address) for source in self.sources):
            workers = min(workers, 1)  # each worker would fetch a stream whole
        return from_workers(self._portions, workers)

    def _portions(self, worker: int, workers: int) -> Iterator[Portion[Collated]]:
        """Yields the portions that process `worker` of `workers` makes for this rank."""
        turn, turns = worker * self.world_size + self.rank, workers * self.world_size
        sources = list(enumerate(self.sources))
        if self.divide_sources and len(sources) >= workers:
            turn, turns = 0, 1
            sources = sources[worker::workers]
        number = 0  # of the next portion
        start = 0  # position of its first sample
        for index, source in sources:
            damage = Skipped()
            samples = self.read(source, damage)
            while rows := list(islice(samples, self.batch_size)):
                if number % turns == turn:
                    yield self._portion(index, start, rows)
                number += 1
                start += len(rows)
            if number % turns == turn:
                yield Portion(index, [], None, damage, end=True)
            number += 1

    def _portion(self, source: int, start: int, samples: list[Sample]) -> Portion[Collated]:
        """Returns the portion of some samples of a source, the first at the position `start`."""
        prepared = []
        keys = []
        skipped = Skipped()
        for position, sample in enumerate(samples, start):
            sample["__position__"] = position
            try:
                prepared.append(self.prepare(sample))
                keys.append(sample["__key__"])
            except BrokenSample as broken:
                skipped.add(broken.reason, described(sample), broken.detail)
        batch = self.collate(prepared) if prepared else None
        return Portion(source, keys, batch, skipped)
