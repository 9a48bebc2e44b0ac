"""The samples of tars in stored order, prepared by several processes: for evaluation, and for the writers of sidecars.

Every worker goes over all samples, and reads and prepares the batches b with b % workers equal to its number. So the order
does not depend on the number of workers, and no process waits for the one that has the next tar.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from simplclip.data.errors import BrokenSample, Skipped
from simplclip.data.samples import place_of
from simplclip.data.sources import Address
from simplclip.data.tars import Sample
from simplclip.data.workers import from_workers

# Yields all samples of a source; skipped: counts of damage; wanted: see `tars.read`.
Reader = Callable[[Any, Skipped, Callable[[int], bool]], Iterator[Sample]]


class Portion(NamedTuple):
    """A batch of one source, or the end of a source."""

    source: int  # number of the source
    positions: list[int]  # of the batch's samples among all samples of all sources
    batch: Any  # what `collate` returned; None at the end of a source, and if no sample of the batch is usable
    skipped: Skipped  # damage in the batch; at the end of a source that of the tar itself
    end: bool  # whether the source ends here


@dataclass
class StoredOrder:
    """Samples in stored order. Batches do not go over the end of a source.

    sources: whatever `read` takes. prepare: function of a sample, in a worker; it may raise BrokenSample. collate: function
    of a list of what `prepare` returned, in a worker. rank, world_size: this rank makes every `world_size`-th portion.
    """

    sources: Sequence[Any]
    read: Reader
    prepare: Callable[[Sample], Any]
    batch_size: int
    collate: Callable[[list[Any]], Any] = list
    rank: int = 0
    world_size: int = 1

    def portions(self, workers: int = 0) -> Generator[Portion, None, None]:
        """Yields the portions, from `workers` processes. Raises ShardError, and WorkerError if a process died."""
        return from_workers(self._portions, workers)

    def _portions(self, worker: int, workers: int) -> Iterator[Portion]:
        turn, turns = worker * self.world_size + self.rank, workers * self.world_size
        number, start = 0, 0  # of the source's first portion, and of its first sample
        for index, source in enumerate(self.sources):

            def wanted(sample: int, first: int = number) -> bool:
                return (first + sample // self.batch_size) % turns == turn

            damage, count, rows = Skipped(), 0, []
            for sample in self.read(source, damage, wanted):
                if wanted(count):
                    rows.append((start + count, sample))
                count += 1
                if rows and count % self.batch_size == 0:
                    yield self._portion(index, rows)
                    rows = []
            if rows:
                yield self._portion(index, rows)
            number, start = number - (-count // self.batch_size), start + count
            if number % turns == turn:
                yield Portion(index, [], None, damage, True)
            number += 1

    def _portion(self, index: int, rows: list[tuple[int, Sample]]) -> Portion:
        prepared, positions, skipped = [], [], Skipped()
        for position, sample in rows:
            try:
                prepared.append(self.prepare(sample))
                positions.append(position)
            except BrokenSample as broken:
                skipped.add(broken.args[0], place_of(sample), broken.args[1])
        return Portion(index, positions, self.collate(prepared) if prepared else None, skipped, False)


def workers_for(sources: Sequence[Any], workers: int) -> int:
    """Returns the number of workers for sources: at most one for streams, which every worker would fetch whole."""
    return min(workers, 1) if any(isinstance(source, Address) for source in sources) else workers
