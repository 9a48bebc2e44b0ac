"""Training batches: `Loader`. held_out_loader.py makes those of evaluation.

A worker's stream has no end. In each epoch it shuffles the tars by (seed, epoch), takes its part of
them, shuffles samples in a buffer, and only then draws captions, decodes, augments and tokenises.
So a position is two numbers for each worker, the epoch and the samples consumed in it. Another
process can go on from there without decoding what came before.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple

import torch
from webdataset import filters

from simplclip.common.errors import InputError, check_count
from simplclip.data.errors import (
    BrokenSample,
    EmptyDataError,
    Skipped,
    StaleCount,
    StaleFeatures,
)
from simplclip.data.find_sidecars import Folders, check_sidecars
from simplclip.data.find_sources import Source, in_words, sources_of
from simplclip.data.read_tars import read_tar
from simplclip.data.samples import (
    MAX_BYTES,
    Sample,
    described,
    digest_of,
    is_held_out,
    parse,
)
from simplclip.data.transforms import ImageTransform, stack_pixels
from simplclip.data.views import pixels_of, seeded
from simplclip.data.workers import from_workers

# attributes of the loader that a state_dict belongs to
STATE_OWNER = ("rank", "world_size", "workers", "seed")
# keys of a state_dict, which in version 0.1.0 had no digest
STATE = (*STATE_OWNER, "turn", "passes", "consumed")
EMPTY_EPOCHS = 100  # in a row, after which a worker without a usable sample gives up

Batch = dict[str, Any]


class WorkerItem(NamedTuple):
    """A batch, and the position of the worker after it."""

    batch: Batch
    worker: int
    epoch: int
    consumed: int  # samples of the worker's part of this epoch, broken ones included
    skipped: Skipped | None  # since the worker's last item; None without any


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
    list[dict] (the json). With captions_per_image k > 1 "text" is [N, k, L].

    With `teacher` there are also "teacher_image" [N, D] and "teacher_text" [N, D] or [N, k, D],
    float16: a teacher's features of the images and of the drawn captions. If the teacher saw views
    of an image, one of them is drawn in place of the transform's own augmentation; otherwise the
    features are those of the image without augmentation.

    Order: with fewer shards than workers of all ranks, each worker reads all shards and takes its
    share of the samples. In each epoch of all workers every sample comes once, or as often as its
    weight says. The order depends on (seed, workers, world_size) only. The drawn caption and the
    augmentation of a sample depend on (seed, epoch, shard's name, key): the transform may draw from
    the global generators of torch (CPU), random and numpy, which are seeded for it and restored.

    Args:
        shards: tars by path, brace expression, glob, URL or pipe:COMMAND; a mapping {"shards": one
            of these or a list, "weight": W}; or a list of these. See `sources_of`.
        tokenizer: list of captions -> int64 [N, L].
        transform: an ImageTransform; or a function of a PIL image, RGB -> float32 [3, S, S], such
            as open_clip's.
        batch_size: samples of each of this rank's batches, N.
        workers: number of loader processes; 0 reads in the calling process.
        captions_per_image: k captions drawn for each sample, different ones if there are enough.
        teacher: read the features that `simplclip teacher` wrote.
        sidecars: folders with further files of the samples, in the order in which they are joined;
            see find_sidecars.py.
        shuffle_buffer: number of samples, whose files are held in memory; one that holds all of a
            worker shuffles fully.
        pin_memory: copy batches to page-locked memory, for a GPU.
        on_error: "skip" counts damaged tars, "stop" raises ShardError. Broken samples are counted
            in both cases.
        max_bytes: a sample with a file of more bytes is skipped without being read.
        hold_out: share of the samples that is left out, see `samples.is_held_out`; `held_out` reads
            it.
        rank, world_size: this process and their number.
        skipped: counts of what was damaged in the batches so far, by reason, with the first of
            each.

    Raises: InputError if an argument is out of range or shards match no file; ShardError if a shard
    has no sidecar or has changed since its sidecar was made. While iterating: ShardError if a
    teacher's features are missing, or those of too many samples are stale (see StaleCount), or a
    stream or disk fails after several tries; WorkerError if a loader process died (never while the
    caller uses a batch) or cannot send one; EmptyDataError if no sample is usable, or none of a
    worker's in EMPTY_EPOCHS epochs.
    """

    shards: Any
    _: KW_ONLY
    tokenizer: Callable[[list[str]], torch.Tensor]
    transform: ImageTransform | Callable[[Any], torch.Tensor]
    batch_size: int
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
    _stale: StaleCount = field(default_factory=StaleCount, init=False)  # of this process

    def __post_init__(self) -> None:
        counts = ("batch_size", "captions_per_image", "shuffle_buffer", "max_bytes", "world_size")
        for name in counts:
            check_count(name, getattr(self, name), 1)
        check_count("workers", self.workers, 0)
        if not 0 <= self.rank < self.world_size:
            raise InputError(f"rank: expected 0 to {self.world_size - 1}, got {self.rank!r}")
        if self.on_error not in ("skip", "stop"):
            raise InputError(f"on_error: expected skip or stop, got {self.on_error!r}")
        self.sources = sources_of(self.shards)
        check_sidecars(self.sources, self.sidecars)
        self.shards_digest = digest_of([(source.name, source.weight) for source in self.sources])
        self.turn = 0  # the worker that yields the next batch
        # of each: the epoch, and the samples consumed in it
        self.positions = [(0, 0)] * max(1, self.workers)

    def __iter__(self) -> Iterator[Batch]:
        """Yields batches without end, from the one after the last that was yielded.

        Starts the loader processes, which end with the iterator. Each batch moves the position that
        `state_dict` returns, and adds to `skipped`. Raises ShardError, EmptyDataError, WorkerError.
        """
        item: WorkerItem
        for item in from_workers(self.items, self.workers, self.pin_memory):
            self.positions[item.worker] = item.epoch, item.consumed
            self.turn = (item.worker + 1) % len(self.positions)
            if item.skipped is not None:
                self.skipped.merge(item.skipped)
            yield item.batch

    def state_dict(self) -> dict[str, Any]:
        """Returns this rank's position after the last batch yielded, for `load_state_dict`.

        "rank", "world_size", "workers", "seed" and "shards_digest" say whose position it is; "turn"
        is the worker that makes the next batch; "passes" and "consumed" are lists with each
        worker's epoch and the samples consumed in it.
        """
        epochs, consumed = map(list, zip(*self.positions))
        return {
            **self._state_owner(),
            "turn": self.turn,
            "passes": epochs,
            "consumed": consumed,
        }

    def _state_owner(self) -> dict[str, Any]:
        """Returns what a state must agree in: {name: value} of STATE_OWNER, shards_digest."""
        names = (*STATE_OWNER, "shards_digest")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets the position to `state`: iteration yields exactly the batches that would follow.

        state: from `state_dict`, also of another process. The samples before are read, but not
        decoded. Raises InputError for the state of another rank, seed, or number of ranks or
        workers, or of other names or weights of shards.
        """
        state = {"shards_digest": self.shards_digest, **state}
        for name, value in self._state_owner().items():
            if state.get(name) != value:
                raise InputError(f"state: expected one of {name} {value}, got {state.get(name)}")
        self.turn = state["turn"]
        self.positions = list(zip(state["passes"], state["consumed"], strict=True))

    def items(self, process: int, workers: int) -> Iterator[WorkerItem]:
        """Yields the batches of one loader process without end, each with the position after it.

        process: its number, 0 to workers - 1; the first one makes the next batch of the loader. The
        loader itself is not changed. Raises ShardError, and EmptyDataError as the class.
        """
        worker = (process + self.turn) % workers
        first_epoch, consumed_before = self.positions[worker]
        skipped = Skipped()
        rows: list[Prepared] = []  # of the next batch
        empty = 0  # epochs in a row without a usable sample
        for epoch in itertools.count(first_epoch):
            order = self._order(epoch)
            samples = enumerate(self._part(order, epoch, worker, workers, skipped), 1)
            if consumed_before:
                deque(itertools.islice(samples, consumed_before), maxlen=0)
                # counted before the resume, but for the damage within the shuffle buffer
                skipped.take()
            else:
                empty += 1
            consumed_before = 0
            for consumed, row in self._rows(samples, epoch, skipped):
                empty = 0
                rows.append(row)
                if len(rows) < self.batch_size:
                    continue
                damage = skipped.take() if skipped.counts else None
                yield WorkerItem(self._collate(rows), worker, epoch, consumed, damage)
                rows = []
            if empty:
                self._check_usable(epoch)
            if empty == EMPTY_EPOCHS:
                name = f"worker {self.rank * workers + worker + 1} of {self.world_size * workers}"
                raise EmptyDataError(
                    "data: expected usable samples for every loader process, got none in "
                    f"{in_words(self.sources)} for {name} in {empty} epochs; fewer data.workers "
                    f"or larger weights may help; {skipped}"
                )

    def _check_usable(self, epoch: int) -> None:
        """Reads all sources up to the first usable sample; raises EmptyDataError if there is none.

        epoch: the epoch whose captions and pixels are drawn. Damage is counted in the message
        only.
        """
        skipped = Skipped()
        samples = self._read([(source, 0) for source in self.sources], skipped)
        if next(self._rows(enumerate(samples), epoch, skipped), None) is None:
            raise EmptyDataError(
                f"data: expected usable samples, got none in {in_words(self.sources)}; {skipped}"
            )

    def _rows(
        self, samples: Iterator[tuple[int, Sample]], epoch: int, skipped: Skipped
    ) -> Iterator[tuple[int, Prepared]]:
        """Yields (number, prepared sample) of the usable ones among `samples`, (number, sample).

        The number is the sample's in the worker's part of the epoch, from 1. Captions and pixels
        are drawn for `epoch`. Held-out samples are left out; broken ones too, and added to
        `skipped`.
        """
        for consumed, sample in samples:
            if is_held_out(sample, self.hold_out):
                continue
            try:
                prepared = self._prepare(sample, epoch)
            except BrokenSample as broken:
                skipped.add(broken.reason, described(sample), broken.detail)
                if isinstance(broken, StaleFeatures):
                    self._stale.add(described(sample))
                continue
            self._stale.add()
            yield consumed, prepared

    def _order(self, epoch: int) -> list[tuple[Source, int]]:
        """Returns the tars of an epoch in order, each with the number of its copy, from 0.

        A tar comes as often as its weight says. All ranks and workers get the same order.
        """
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

    def _part(
        self,
        order: list[tuple[Source, int]],
        epoch: int,
        worker: int,
        workers: int,
        skipped: Skipped,
    ) -> Iterator[Sample]:
        """Returns an iterator over one worker's samples of an epoch, shuffled if `shuffle` is set.

        order: what `_order` returned. worker: its number of this rank's `workers`. The tars are
        divided as by webdataset's split_by_node, then split_by_worker. With fewer tars than workers
        of all ranks, each worker reads all tars and takes its share of the samples. Damage is added
        to `skipped` as samples are read; if all read all tars, by the first worker only.
        """
        part, parts = self.rank * workers + worker, self.world_size * workers
        if len(order) >= parts:
            samples = self._read(order[self.rank :: self.world_size][worker::workers], skipped)
        else:
            damage = skipped if part == 0 else Skipped()  # every worker meets it
            samples = itertools.islice(self._read(order, damage), part, None, parts)
        if not self.shuffle:
            return samples
        generator = random.Random(f"{self.seed}/{epoch}/{part}/{parts}")
        size = self.shuffle_buffer
        return filters.shuffle(size, initial=size, rng=generator)(samples)

    def _read(self, order: list[tuple[Source, int]], skipped: Skipped) -> Iterator[Sample]:
        """Yields the samples of the tars in `order`, with the files of their sidecars.

        order: (source, number of the copy); a number above 0 becomes the sample's "__copy__".
        Damage is added to `skipped`. Raises ShardError as `read_tar`.
        """
        for source, copy_number in order:
            samples = read_tar(
                source,
                skipped,
                sidecars=self.sidecars or None,
                max_bytes=self.max_bytes,
                on_error=self.on_error,
            )
            for sample in samples:
                if copy_number:
                    sample["__copy__"] = copy_number
                yield sample

    def _prepare(self, sample: Sample, epoch: int) -> Prepared:
        """Parses a sample and draws its captions and pixels for this epoch.

        Global generators are seeded for it and restored. Raises BrokenSample, and ShardError for
        missing features of a teacher.
        """
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
        """Returns `captions_per_image` random indices below `count`, different if possible.

        They are drawn from the global generator of `random`.
        """
        numbers: list[int] = []
        while len(numbers) < self.captions_per_image:
            missing = self.captions_per_image - len(numbers)
            numbers += random.sample(range(count), min(count, missing))
        return numbers

    def _collate(self, rows: list[Prepared]) -> Batch:
        """Tokenises the captions of N samples; returns their batch, a dict as of the class."""
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
        }
        if self.teacher:
            teacher_rows = torch.stack(features)
            batch["teacher_image"] = teacher_rows[:, 0]
            batch["teacher_text"] = teacher_rows[:, 1:] if several else teacher_rows[:, 1]
        return batch
