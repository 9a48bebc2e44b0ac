"""Processes that prepare data, by torch's DataLoader: each makes whole items, one of each in turn.

A process that dies is DataLoader's own error.
"""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from simplclip.common.errors import UserError
from simplclip.common.processes import end_with_parent
from simplclip.data.errors import BrokenSample, Skipped
from simplclip.data.samples import Sample, described
from simplclip.data.shards import Address, Source

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")
Collated = TypeVar("Collated")


def from_workers(
    items: Callable[[int, int], Iterator[Item]], workers: int, pin_memory: bool = False
) -> Iterator[Item]:
    """Yields the items of `workers` processes, one of each in turn, two items ahead.

    items: function of a process's number and their count; 0 workers: called in this process with 0
    and 1. pin_memory: copy tensors to page-locked memory. Raises a user's errors without the
    process's traceback.
    """
    options: dict[str, Any] = {"num_workers": workers, "pin_memory": pin_memory}
    if workers:
        options |= {"prefetch_factor": 2, "worker_init_fn": _begin}
        options["multiprocessing_context"] = "fork" if sys.platform == "linux" else None
    with warnings.catch_warnings():
        # torch warns of more processes than cores
        warnings.filterwarnings("ignore", "This DataLoader will create")
        # without its own generator the DataLoader would draw from the caller's global generator
        loader = DataLoader(
            _Items(items),
            batch_size=None,
            collate_fn=_identity,
            generator=torch.Generator(),
            **options,
        )
        iterator = iter(loader)
    for item in iterator:
        if isinstance(item, UserError):
            raise item
        yield item


def _begin(worker: int) -> None:
    """Sets up a process: it ends with its parent, not by a signal to all processes.

    Ctrl-C, and SIGTERM at the end of a job, reach all; but the trainer needs a batch to finish its
    step.
    """
    end_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _identity(item: Item) -> Item:
    """Returns `item`: the collate_fn of items that are batches already."""
    return item


class _Items(IterableDataset):
    def __init__(self, items: Callable[[int, int], Iterator[Any]]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        """Yields this process's items, and a user's error as the last one."""
        info = get_worker_info()
        try:
            yield from self.items(*((info.id, info.num_workers) if info else (0, 1)))
        except UserError as error:
            yield error


class Portion(NamedTuple, Generic[Collated]):
    """Some samples of one source; none at its end."""

    source: int  # its index
    keys: list[str]  # of the usable samples
    batch: Collated | None  # from `collate`; None if no sample is usable
    skipped: Skipped  # damage of the samples, and of the tar up to them
    end: bool  # of the source


@dataclass
class StoredOrder(Generic[Prepared, Collated]):
    """The samples of sources in stored order, in portions of `batch_size`.

    prepare: function of a sample, in a worker, which has its position among all samples under
    "__position__"; it may raise BrokenSample. collate: function of a list of prepared samples.
    rank, world_size: this rank makes every `world_size`-th portion.
    """

    sources: Sequence[Source]
    read: Callable[[Source, Skipped], Iterator[Sample]]
    prepare: Callable[[Sample], Prepared]
    batch_size: int
    collate: Callable[[list[Prepared]], Collated]
    rank: int = 0
    world_size: int = 1
    # whether each worker has sources of its own, if there are enough; only the portions of each
    # source are then in order. Else every worker reads all, and prepares every n-th portion.
    divide_sources: bool = False

    def portions(self, workers: int = 0) -> Iterator[Portion[Collated]]:
        """Yields this rank's portions, made by `workers` processes; 0: by this one."""
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
        number = start = 0  # of the next portion, and the position of its first sample
        for index, source in sources:
            damage = Skipped()
            samples = self.read(source, damage)
            end = False
            while not end:
                rows = list(islice(samples, self.batch_size))
                end = not rows
                read_damage = damage.take()
                if number % turns == turn:
                    yield self._portion(index, start, rows, read_damage)
                number += 1
                start += len(rows)

    def _portion(
        self, source: int, start: int, samples: list[Sample], skipped: Skipped
    ) -> Portion[Collated]:
        """Returns the portion of some samples of a source, the first at the position `start`."""
        prepared = []
        keys = []
        for position, sample in enumerate(samples, start):
            sample["__position__"] = position
            try:
                prepared.append(self.prepare(sample))
                keys.append(sample["__key__"])
            except BrokenSample as broken:
                skipped.add(broken.reason, described(sample), broken.detail)
        batch = self.collate(prepared) if prepared else None
        return Portion(source, keys, batch, skipped, end=not samples)
