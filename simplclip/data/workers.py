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
    """Some samples of one source."""

    source: int  # its index
    keys: list[str]  # of the usable samples
    batch: Collated | None  # from `collate`; None if no sample is usable
    skipped: Skipped  # damage of the samples, and of the tar up to them


@dataclass
class StoredOrder(Generic[Prepared, Collated]):
    """The samples of sources in stored order, in portions of at most `batch_size`.

    Every process reads all, and prepares every n-th portion.
    """

    sources: Sequence[Source]
    read: Callable[[Source, Skipped], Iterator[Sample]]
    # in a process, of a sample that has its position among all under "__position__"
    prepare: Callable[[Sample], Prepared]
    batch_size: int
    collate: Callable[[list[Prepared]], Collated]
    rank: int = 0  # this one makes every `world_size`-th portion
    world_size: int = 1

    def portions(self, workers: int = 0) -> Iterator[Portion[Collated]]:
        """Yields this rank's portions, made by `workers` processes; 0: by this one."""
        if any(isinstance(source.url, Address) for source in self.sources):
            workers = min(workers, 1)  # each worker would fetch a stream whole
        return from_workers(self._portions, workers)

    def _portions(self, worker: int, workers: int) -> Iterator[Portion[Collated]]:
        """Yields the portions that process `worker` of `workers` makes for this rank."""
        turn, turns = worker * self.world_size + self.rank, workers * self.world_size
        number = start = 0  # of the next portion, and the position of its first sample
        for index, source in enumerate(self.sources):
            skipped = Skipped()
            samples = self.read(source, skipped)
            size = self.batch_size
            while size == self.batch_size:
                rows = [*islice(samples, self.batch_size)]
                size = len(rows)
                damage = skipped.take()  # counted with this portion, by one process
                if number % turns == turn:
                    yield self._portion(index, start, rows, damage)
                number += 1
                start += size

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
        return Portion(source, keys, batch, skipped)
