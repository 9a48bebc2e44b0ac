"""The samples of tars in stored order, prepared by several processes: for evaluation, and for the writers of sidecars.

Every worker goes over all samples, and reads and prepares the batches b with b % workers equal to its number. So the order
does not depend on the number of workers, and no process waits for the one that has the next tar.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset, get_worker_info

from simplclip.data.errors import BrokenSample, ShardError, Skipped
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
class StoredOrder(IterableDataset):
    """Samples in stored order. Iterating yields `Portion`s; batches do not go over the end of a source.

    sources: URLs or others that `read` takes. prepare: function of a sample, in a worker; it may raise BrokenSample.
    collate: function of a list of what `prepare` returned, in a worker. rank, world_size: only the batches of this rank are
    prepared and yielded, every `world_size`-th.
    """

    sources: Sequence[Any]
    read: Reader
    prepare: Callable[[Sample], Any]
    batch_size: int
    collate: Callable[[list[Any]], Any] = list
    rank: int = 0
    world_size: int = 1

    def portions(self, workers: int = 0) -> Iterator[Portion]:
        """Yields the portions, from `workers` processes. Raises ShardError, and WorkerError if a process died."""
        yield from from_workers(self, workers)

    def __iter__(self) -> Iterator[Portion | ShardError]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        try:
            yield from self._portions(worker * self.world_size + self.rank, workers * self.world_size)
        except ShardError as error:
            yield error  # raised in the main process, without the worker's traceback

    def _portions(self, turn: int, turns: int) -> Iterator[Portion]:
        """Yields the portions n with n % turns == turn."""
        number, position = 0, 0  # of the portion, and of the sample

        for index, source in enumerate(self.sources):
            damage, batch = Skipped(), _Batch()
            first, start = number, position

            def wanted(sample: int, first: int = first) -> bool:
                return (first + sample // self.batch_size) % turns == turn

            for sample in self.read(source, damage, wanted):
                if wanted(position - start):
                    self._add(batch, position, sample)
                position += 1
                if (position - start) % self.batch_size == 0:
                    if number % turns == turn:
                        yield self._portion(index, batch)
                        batch = _Batch()
                    number += 1
            if (position - start) % self.batch_size:
                if number % turns == turn:
                    yield self._portion(index, batch)
                number += 1
            if number % turns == turn:
                yield Portion(index, [], None, damage, True)
            number += 1

    def _add(self, batch: _Batch, position: int, sample: Sample) -> None:
        try:
            batch.prepared.append(self.prepare(sample))
            batch.positions.append(position)
        except BrokenSample as broken:
            batch.skipped.add(broken.args[0], place_of(sample), broken.args[1])

    def _portion(self, index: int, batch: _Batch) -> Portion:
        return Portion(index, batch.positions, self.collate(batch.prepared) if batch.prepared else None, batch.skipped, False)


@dataclass
class _Batch:
    prepared: list[Any] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    skipped: Skipped = field(default_factory=Skipped)


def workers_for(sources: Sequence[Any], workers: int) -> int:
    """Returns the number of workers for sources: at most one for streams, which every worker would fetch whole."""
    return min(workers, 1) if any(isinstance(source, Address) for source in sources) else workers
