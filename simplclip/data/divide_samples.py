"""The samples that each rank and loader process reads for training, without decoding them.

A loader process whose samples of an epoch are less than a step would put them into a batch several
times. So in small data the processes of a rank have one stream in common. Each of them reads all of
it, and decodes its share.
"""

from __future__ import annotations

import itertools
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from webdataset import filters

from simplclip.common.errors import InputError
from simplclip.data.errors import Skipped
from simplclip.data.find_sources import Address, Source
from simplclip.data.read_meta import listed_samples
from simplclip.data.read_tars import count_samples
from simplclip.data.samples import Sample, is_held_out

# who has tars of its own: every loader process; every rank, whose processes share their samples; or
# nobody: the ranks divide the samples, and the processes of a rank share its samples
PROCESSES, RANKS, SAMPLES = "processes", "ranks", "samples"

# Steps in an average part, from which a smaller part matters little: it comes seldom, and the batch
# is filled from the next epoch.
_MANY_STEPS = 8
_COUNTED = 1000  # most samples that are counted by their headers, in at most
_OPENED = 100  # so many tars

Order = Iterable[tuple[Source, int]]  # tars, each with the number of its copy, from 0


@dataclass(frozen=True)
class Streams:
    """The samples of ranks and loader processes in each epoch."""

    sources: Sequence[Source]
    read: Callable[[Source, Skipped], Iterator[Sample]]  # counts damage
    hold_out: float  # share of the samples that are left out
    seed: int
    shuffle_buffer: int  # 0: do not shuffle
    rank: int
    ranks: int
    workers: int  # loader processes of each rank, at least 1
    division: str  # PROCESSES, RANKS or SAMPLES

    @property
    def shared(self) -> bool:
        """Whether the processes of a rank have one stream."""
        return self.workers > 1 and self.division != PROCESSES

    def number(self, worker: int) -> tuple[int, int]:
        """Returns the number of a worker's stream, and the number of streams of all ranks."""
        if self.division == PROCESSES:
            return self.rank * self.workers + worker, self.ranks * self.workers
        return self.rank, self.ranks

    def epoch(self, epoch: int, worker: int, skipped: Skipped) -> Iterator[tuple[int, Sample]]:
        """Yields an epoch of the stream of this rank's `worker`, shuffled; samples are numbered.

        The numbers begin with 1, and count held-out samples too. Tars are divided as by
        webdataset's split_by_node, then split_by_worker. Damage is added to `skipped` as samples
        are read; if others read the same tars, by the first worker only.
        """
        tars = self._order(epoch)
        counts_damage = worker == 0 or self.division == PROCESSES
        if self.division == SAMPLES:
            counts_damage = counts_damage and self.rank == 0
        else:
            tars = tars[self.rank :: self.ranks]
        if self.division == PROCESSES:
            tars = tars[worker :: self.workers]
        samples = self._samples(tars, skipped if counts_damage else Skipped())
        if self.division == SAMPLES:
            samples = itertools.islice(samples, self.rank, None, self.ranks)
        if self.shuffle_buffer:
            number, count = self.number(worker)
            generator = random.Random(f"{self.seed}/{epoch}/{number}/{count}")
            size = self.shuffle_buffer
            samples = filters.shuffle(size, initial=size, rng=generator)(samples)
        return enumerate(samples, 1)

    def in_training(self, order: Order, skipped: Skipped) -> Iterator[Sample]:
        """Yields the samples of tars that are not held out."""
        for sample in self._samples(order, skipped):
            if not is_held_out(sample, self.hold_out):
                yield sample

    def _order(self, epoch: int) -> list[tuple[Source, int]]:
        """Returns the tars of an epoch, as often as their weights say; all ranks get the same."""
        generator = random.Random(f"{self.seed}/{epoch}")
        order: list[tuple[Source, int]] = []
        for source in self.sources:
            copies, fraction = int(source.weight), source.weight % 1
            if fraction > 0 and generator.random() < fraction:
                copies += 1
            order += [(source, copy_number) for copy_number in range(copies)]
        if self.shuffle_buffer:
            generator.shuffle(order)
        return order

    def _samples(self, order: Order, skipped: Skipped) -> Iterator[Sample]:
        """Yields the samples of tars; the number of a copy above 0 becomes their "__copy__"."""
        for source, copy_number in order:
            for sample in self.read(source, skipped):
                if copy_number:
                    sample["__copy__"] = copy_number
                yield sample


def choose_division(streams: Streams, step: int) -> str:
    """Returns PROCESSES, RANKS or SAMPLES, the first one whose streams have a step in an epoch.

    step: samples of a rank's step. Raises InputError if all that train are less than a step of all.
    """
    samples = _estimate_samples(streams.sources)
    step_of_all = step * streams.ranks
    if samples is not None:
        longest = sum(
            count * math.ceil(source.weight) for count, source in zip(samples, streams.sources)
        )
        if longest * (1 - streams.hold_out) < 2 * step_of_all:  # few enough to be counted
            _check_step(streams, step_of_all)
    step = math.ceil(step / (1 - streams.hold_out))
    processes = streams.ranks * streams.workers
    if processes == 1 or _enough(streams.sources, samples, step, processes):
        return PROCESSES
    if streams.workers > 1 and _enough(streams.sources, samples, step, streams.ranks):
        return RANKS
    return SAMPLES


def _check_step(streams: Streams, step: int) -> None:
    """Raises InputError if the longest epoch has some samples that train, but less than `step`."""
    order = (
        (source, copy_number)
        for source in streams.sources
        for copy_number in range(math.ceil(source.weight))
    )
    in_training = streams.in_training(order, Skipped())
    count = sum(1 for _ in itertools.islice(in_training, step))
    if 0 < count < step:
        raise InputError(
            f"data.batch_size: expected at most {count:,}, the number of samples that train, got "
            f"{step:,}; lower it or add data"
        )


def _enough(sources: Sequence[Source], samples: list[float] | None, step: int, parts: int) -> bool:
    """Whether `parts` parts of whole tars have a step each; without `samples`, a tar each."""
    fewest = sum(int(source.weight) for source in sources) // parts  # tars of a part
    if samples is None or not fewest:
        return fewest > 0
    weights = [source.weight for source in sources]
    mean = sum(count * weight for count, weight in zip(samples, weights)) / parts
    least = 0.0  # samples of a part of the smallest tars
    for count, weight in sorted(zip(samples, weights)):
        copies = min(fewest, int(weight))
        least += copies * count
        fewest -= copies
    return least >= step or mean >= _MANY_STEPS * step


def _estimate_samples(sources: Sequence[Source]) -> list[float] | None:
    """Returns the samples of each tar, by meta.json, headers or bytes; None with a stream."""
    if any(isinstance(source.url, Address) for source in sources):
        return None
    sizes = [size_of(source) or 0 for source in sources]
    samples: list[float | None] = [*listed_samples(sources)]
    counted = counted_bytes = 0
    smallest = sorted(range(len(sources)), key=sizes.__getitem__)
    for index in [index for index in smallest if samples[index] is None][:_OPENED]:
        limit = _COUNTED - counted
        if not limit:
            break
        count, length = count_samples(sources[index].url, limit)
        if count < limit:
            samples[index], length = count, sizes[index]
        counted += count
        counted_bytes += length
    rate = counted / max(1, counted_bytes)
    return [size * rate if count is None else count for count, size in zip(samples, sizes)]


def size_of(source: Source) -> int | None:
    """Returns the bytes of a tar; None for a stream, and for a file that is not there."""
    try:
        return None if isinstance(source.url, Address) else os.path.getsize(source.url)
    except OSError:
        return None
