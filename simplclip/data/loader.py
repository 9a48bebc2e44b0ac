"""Training batches: `Loader`. held_out_loader.py makes those of evaluation.

In each epoch the tars are shuffled by (seed, epoch) and divided, samples are shuffled in a buffer,
and only then captions are drawn, images decoded and augmented, and texts tokenised. There are two
ways to divide. Where each part has TEN batches or more, a worker has tars of its own, as by
webdataset's split_by_worker. In smaller data every worker reads all samples of its rank and
prepares those of every n-th batch, so that a batch has different samples.

A position is three numbers for each worker, see Place. Another process can go on from there without
decoding what came before.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple

import torch
from webdataset import filters

from simplclip.common.errors import InputError, check_count
from simplclip.data.errors import BrokenSample, EmptyDataError, Skipped
from simplclip.data.samples import MAX_BYTES, Sample, described, digest_of, is_held_out, parse
from simplclip.data.shards import Source, estimated_samples, in_words, sources_of
from simplclip.data.sidecars import Folders, check_sidecars, read_joined
from simplclip.data.transforms import Transform, pixels_of, seeded, stack_pixels
from simplclip.data.workers import from_workers

TEN = 10
# epochs in a row, or broken samples up to the end of one, without a usable sample for a worker
EMPTY_EPOCHS, BROKEN_SAMPLES = 100, 10_000
# arguments that are at least 1
COUNTS = ("batch_size", "batches_per_step", "captions_per_image", "shuffle_buffer", "max_bytes")
# attributes of the loader in which a state must agree
STATE_OWNER = ("rank", "world_size", "workers", "seed", "shards_digest", "own_tars")

Batch = dict[str, Any]


class Place(NamedTuple):
    """Where a worker stands among the samples that it reads."""

    epoch: int = 0
    consumed: int = 0  # samples of the epoch, broken ones included
    number: int = 0  # samples of all epochs that train


class Block(NamedTuple):
    """A batch that a worker made."""

    batch: Batch
    place: Place  # after the batch
    worker: int
    skipped: Skipped  # since the worker's last block


class Prepared(NamedTuple):
    """A sample as it enters a batch."""

    pixels: torch.Tensor
    captions: list[str]  # that were drawn
    group_id: int
    key: str
    record: dict[str, Any]
    features: torch.Tensor | None  # a teacher's, of the image and of the captions


@dataclass
class Loader:
    """Training batches without end: each worker goes over its part of the data again.

    Batches are dicts: "image" uint8 [N, 3, S, S] (`transform.finish` normalises it on the device;
    the images of a caller's own transform are float32 and finished), "text" int64 [N, L], "group"
    int64 [N] (hash of the json's "group", else of shard and key), "key" list[str], "meta"
    list[dict] (the json), "captions" list[list[str]] (those drawn). With captions_per_image k > 1
    "text" is [N, k, L]. With `teacher` there are also "teacher_image" [N, D] and "teacher_text"
    [N, D] or [N, k, D], float16. If the teacher saw views of an image, one of them is drawn in
    place of the transform's own augmentation.

    In each epoch of all ranks every sample comes once, or as often as its weight says. The order
    depends on (seed, workers, world_size) and the size of a step; in small data without broken
    samples not on the workers. The drawn caption and the augmentation of a sample depend on (seed,
    epoch, shard's name, key): the transform may draw from the global generators of torch (CPU),
    random and numpy, which are seeded for it and restored.

    Args:
        shards: tars, see `sources_of`.
        tokenizer: list of captions -> int64 [N, L], with one L for all lists.
        transform: an ImageTransform; or a function of a PIL image, RGB -> float32 [3, S, S].
        batch_size: samples of each of this rank's batches, N.
        batches_per_step: batches of a step; more than 1 with gradient caching.
        workers: number of loader processes; 0 reads in the calling process.
        captions_per_image: k captions drawn for each sample, different ones if there are enough.
        teacher: read the features that `simplclip teacher` wrote.
        sidecars: folders with further files of the samples, see sidecars.py.
        shuffle_buffer: number of samples, whose files are held in memory.
        pin_memory: copy batches to page-locked memory, for a GPU.
        on_error: "stop" raises ShardError for damaged tars, "skip" counts them, as broken samples.
        max_bytes: a sample with a file of more bytes is skipped without being read.
        hold_out: share of the samples that is left out; `held_out` reads it.
        rank, world_size: this process and their number.
        skipped: counts of what was damaged in the batches so far.

    Raises: InputError if an argument is out of range, if shards match no file, or if they have
    fewer samples than a step of all ranks; ShardError if a shard has no sidecar or has changed
    since its sidecar was made. While iterating: ShardError if a file cannot be read or a teacher's
    features are missing; EmptyDataError if no sample is usable; DataLoader's RuntimeError if a
    loader process died.
    """

    shards: Any
    _: KW_ONLY
    tokenizer: Callable[[list[str]], torch.Tensor]
    transform: Transform
    batch_size: int
    batches_per_step: int = 1
    workers: int = 0
    captions_per_image: int = 1
    teacher: bool = False
    sidecars: Folders = ()
    shuffle: bool = True
    shuffle_buffer: int = 4096
    seed: int = 0
    pin_memory: bool = False
    on_error: str = "skip"
    max_bytes: int = MAX_BYTES
    hold_out: float = 0.0
    rank: int = 0
    world_size: int = 1
    skipped: Skipped = field(default_factory=Skipped, init=False)

    def __post_init__(self) -> None:
        for name in (*COUNTS, "world_size"):
            check_count(name, getattr(self, name), 1)
        check_count("workers", self.workers, 0)
        if not 0 <= self.rank < self.world_size:
            raise InputError(f"rank: expected 0 to {self.world_size - 1}, got {self.rank!r}")
        if self.on_error not in ("skip", "stop"):
            raise InputError(f"on_error: expected skip or stop, got {self.on_error!r}")
        self.sources = sources_of(self.shards)
        check_sidecars(self.sources, self.sidecars)
        tars = [(source.name, source.weight) for source in self.sources]
        self.shards_digest = digest_of([*zip(tars, (source.size for source in self.sources))])
        self.own_tars = self._divides_tars()
        self.turn = 0  # the worker that yields the next batch
        self.positions = [Place()] * max(1, self.workers)  # of each

    def _divides_tars(self) -> bool:
        """Whether each worker has tars of its own. Raises InputError for less than a step."""
        parts = self.world_size * max(1, self.workers)
        step = self.batch_size * self.batches_per_step
        samples = estimated_samples(self.sources)
        enough_tars = sum(int(source.weight) for source in self.sources) >= parts
        if samples is None:
            return enough_tars
        weights = [source.weight for source in self.sources]
        in_training = sum(map(float.__mul__, samples, weights)) * (1 - self.hold_out)
        if in_training < 2 * step * self.world_size:
            self._check_step(step * self.world_size)
        return parts == 1 or (enough_tars and in_training >= TEN * step * parts)

    def _check_step(self, step: int) -> None:
        """Raises InputError if the longest epoch has samples that train, but less than `step`."""
        order = [(source, n) for source in self.sources for n in range(math.ceil(source.weight))]
        samples = self._samples(order, Skipped())
        in_training = (sample for sample in samples if not is_held_out(sample, self.hold_out))
        count = sum(1 for _ in itertools.islice(in_training, step))
        if 0 < count < step:
            raise InputError(
                f"data.batch_size: expected at most {count:,}, the number of samples that train, "
                f"got {step:,}; lower it or add data"
            )

    def _samples(self, order: Iterable[tuple[Source, int]], skipped: Skipped) -> Iterator[Sample]:
        """Yields the samples of tars; the number of a copy above 0 becomes their "__copy__"."""
        options = {"max_bytes": self.max_bytes, "on_error": self.on_error}
        for source, copy_number in order:
            for sample in read_joined(source, skipped, self.sidecars, **options):
                if copy_number:
                    sample["__copy__"] = copy_number
                yield sample

    def _order(self, epoch: int) -> list[tuple[Source, int]]:
        """Returns the tars of an epoch with the number of each copy; all ranks get the same."""
        generator = random.Random(f"{self.seed}/{epoch}")
        order: list[tuple[Source, int]] = []
        for source in self.sources:
            copies, fraction = int(source.weight), source.weight % 1
            if fraction > 0 and generator.random() < fraction:
                copies += 1
            order += [(source, copy_number) for copy_number in range(copies)]
        if self.shuffle:
            generator.shuffle(order)
        return order

    def _epoch(self, epoch: int, worker: int, skipped: Skipped) -> Iterator[tuple[int, Sample]]:
        """Yields an epoch of the samples that a worker reads, shuffled, numbered from 1.

        Damage is added to `skipped` as samples are read; if others read the same tars, by the first
        worker only.
        """
        part, parts = self.rank, self.world_size
        order: Sequence[tuple[Source, int]] = self._order(epoch)
        if self.own_tars:
            workers = len(self.positions)
            part, parts = self.rank * workers + worker, parts * workers
            order = order[part::parts]
        counts_damage = self.own_tars or self.rank == worker == 0
        samples = self._samples(order, skipped if counts_damage else Skipped())
        if not self.own_tars:
            samples = itertools.islice(samples, part, None, parts)
        if self.shuffle:
            generator = random.Random(f"{self.seed}/{epoch}/{part}/{parts}")
            size = self.shuffle_buffer
            samples = filters.shuffle(size, initial=size, rng=generator)(samples)
        return enumerate(samples, 1)

    def __iter__(self) -> Iterator[Batch]:
        """Yields batches without end, from the one after the last that was yielded.

        Starts the loader processes, which end with the iterator. Each batch moves the position that
        `state_dict` returns, and adds to `skipped`. Raises ShardError, EmptyDataError.
        """
        for block in from_workers(self.items, self.workers, self.pin_memory):
            self.skipped.merge(block.skipped)
            self.positions[block.worker] = block.place
            self.turn = (block.worker + 1) % len(self.positions)
            yield block.batch

    def state_dict(self) -> dict[str, Any]:
        """Returns this rank's position after the last batch yielded, for `load_state_dict`.

        The values of STATE_OWNER say whose position it is; "turn" is the worker that makes the next
        batch; "positions" has each worker's Place.
        """
        owner = {name: getattr(self, name) for name in STATE_OWNER}
        return owner | {"turn": self.turn, "positions": [list(place) for place in self.positions]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets the position to `state`: iteration yields exactly the batches that would follow.

        state: from `state_dict`, also of another process. The samples before are read, but not
        decoded. Raises InputError for the state of another rank, seed, or number of ranks or
        workers, of other names, weights or sizes of shards, or of another division of them.
        """
        for name in STATE_OWNER:
            value = getattr(self, name)
            if state.get(name) != value:
                raise InputError(f"state: expected one of {name} {value}, got {state.get(name)}")
        self.turn = state["turn"]
        self.positions = [Place(*place) for place in state["positions"]]

    def items(self, process: int, workers: int) -> Iterator[Block]:
        """Yields the blocks of one loader process without end.

        process: its number, 0 to workers - 1; the first one makes the next batch of the loader. The
        loader itself is not changed. Raises ShardError, EmptyDataError.
        """
        worker = (process + self.turn) % workers
        first_epoch, consumed_before, number = self.positions[worker]
        skipped = Skipped()
        rows: list[Prepared] = []  # of the next block
        idle = broken = 0  # epochs, and samples, in a row without a usable sample
        for epoch in itertools.count(first_epoch):
            idle += 1
            samples = self._epoch(epoch, worker, skipped)
            if consumed_before:
                deque(itertools.islice(samples, consumed_before), maxlen=0)
                consumed_before = 0
                # counted before the resume, but for the damage within the shuffle buffer
                skipped.take()
            for consumed, sample in samples:
                if is_held_out(sample, self.hold_out):
                    continue
                turn = number // self.batch_size % workers
                number += 1
                if not self.own_tars and turn != worker:
                    continue
                try:
                    rows.append(self._prepare(sample, epoch))
                except BrokenSample as error:
                    skipped.add(error.reason, described(sample), error.detail)
                    broken += 1
                    continue
                idle = broken = 0
                if len(rows) == self.batch_size:
                    place = Place(epoch, consumed, number)
                    yield Block(self._collate(rows), place, worker, skipped.take())
                    rows = []
            if idle == EMPTY_EPOCHS or (idle and broken >= BROKEN_SAMPLES):
                got = f"none in {in_words(self.sources)} in {idle} epochs; {skipped}"
                raise EmptyDataError(f"data: expected usable samples, got {got}")

    def _prepare(self, sample: Sample, epoch: int) -> Prepared:
        """Parses a sample and draws its captions and pixels for this epoch."""
        pair = parse(sample, self.teacher)
        seeds = [self.seed, epoch, pair.name]
        if "__copy__" in sample:
            seeds.append(sample["__copy__"])
        view_number, view = 0, None
        with seeded(*seeds):
            caption_numbers = self._draw_captions(len(pair.captions))
            if pair.views:
                view_number = random.randrange(len(pair.views))
                view = pair.views[view_number]
            pixels = pixels_of(self.transform, pair, view)
        features = None
        if pair.features is not None:
            images = len(pair.features) - len(pair.captions)  # rows before those of the captions
            rows = [view_number, *(images + number for number in caption_numbers)]
            features = torch.from_numpy(pair.features[rows])
        captions = [pair.captions[number] for number in caption_numbers]
        return Prepared(pixels, captions, pair.group_id, pair.key, pair.record, features)

    def _draw_captions(self, count: int) -> list[int]:
        """Draws indices below `count` from `random`'s generator, different if possible."""
        numbers: list[int] = []
        while len(numbers) < self.captions_per_image:
            missing = self.captions_per_image - len(numbers)
            numbers += random.sample(range(count), min(count, missing))
        return numbers

    def _collate(self, rows: list[Prepared]) -> Batch:
        """Tokenises the captions of N samples; returns their batch."""
        images, captions, groups, keys, records, features = zip(*rows)
        stacked = stack_pixels if images[0].dtype == torch.uint8 else torch.stack
        tokens = self.tokenizer(list(itertools.chain.from_iterable(captions)))
        several = self.captions_per_image > 1
        if several:
            tokens = tokens.unflatten(0, (-1, self.captions_per_image))
        batch: Batch = {
            "image": stacked(images),
            "text": tokens,
            "group": torch.tensor(groups, dtype=torch.int64),
            "key": list(keys),
            "meta": list(records),
            "captions": list(captions),
        }
        if self.teacher:
            teacher_rows = torch.stack(features)
            batch["teacher_image"] = teacher_rows[:, 0]
            batch["teacher_text"] = teacher_rows[:, 1:] if several else teacher_rows[:, 1]
        return batch
