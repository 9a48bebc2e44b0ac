"""Training batches: `Loader`. held_out_loader.py makes those of evaluation.

A worker's stream has no end. In each epoch it shuffles the tars by (seed, epoch), takes its part of
them, shuffles samples in a buffer, and only then draws captions, decodes, augments and tokenises.
So a position is two numbers for each worker, the epoch and the samples consumed in it. Another
process can go on from there without decoding what came before.

In small data the workers of a rank have one stream (divide_samples.py). Each decodes its own blocks
of it, every `workers`-th, and the position is that of the last sample in a batch. A broken sample
leaves its block short, and the samples that follow it fill the batch.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from simplclip.common.errors import InputError, check_count
from simplclip.data.cut_blocks import Batch, Block, Place, whole_batches
from simplclip.data.divide_samples import PROCESSES, Streams, choose_division, size_of
from simplclip.data.errors import (
    BrokenSample,
    EmptyDataError,
    Skipped,
    StaleCount,
    StaleFeatures,
)
from simplclip.data.find_sidecars import Folders, check_sidecars
from simplclip.data.find_sources import in_words, sources_of
from simplclip.data.read_tars import read_tar
from simplclip.data.samples import (
    MAX_BYTES,
    Sample,
    described,
    digest_of,
    is_held_out,
    parse,
)
from simplclip.data.transforms import stack_pixels
from simplclip.data.views import Transform, pixels_of, seeded
from simplclip.data.workers import from_workers

# attributes of the loader that a state_dict belongs to
STATE_OWNER = ("rank", "world_size", "workers", "seed")
STATE = (*STATE_OWNER, "turn", "passes", "consumed")  # keys of a state_dict
# arguments that are at least 1
COUNTS = ("batch_size", "batches_per_step", "captions_per_image", "shuffle_buffer", "max_bytes")
EMPTY_EPOCHS = 100  # in a row, after which a stream without a usable sample is an error


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
    "text" is [N, k, L].

    With `teacher` there are also "teacher_image" [N, D] and "teacher_text" [N, D] or [N, k, D],
    float16: a teacher's features of the images and of the drawn captions. If the teacher saw views
    of an image, one of them is drawn in place of the transform's own augmentation; otherwise the
    features are those of the image without augmentation.

    Order: in each epoch of all ranks every sample comes once, or as often as its weight says. A
    step has no sample twice, unless an epoch ends in it; then both have one group. A worker has
    shards of its own if their samples are enough for steps. Otherwise the workers of a rank share
    its samples, and the order is that of one worker. The order depends on (seed, workers,
    world_size) and on the size of a step. The drawn caption and the augmentation of a sample depend
    on (seed, epoch, shard's name, key): the transform may draw from the global generators of torch
    (CPU), random and numpy, which are seeded for it and restored.

    Args:
        shards: tars by path, brace expression, glob, URL or pipe:COMMAND; a mapping {"shards": one
            of these or a list, "weight": W}; or a list of these. See `sources_of`.
        tokenizer: list of captions -> int64 [N, L], with one L for all lists.
        transform: an ImageTransform; or a function of a PIL image, RGB -> float32 [3, S, S], such
            as open_clip's.
        batch_size: samples of each of this rank's batches, N.
        batches_per_step: batches of a step; more than 1 with gradient caching.
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
        hold_out: share of the samples that is left out, see `samples.is_held_out`;
            `held_out` reads it.
        rank, world_size: this process and their number.
        skipped: counts of what was damaged in the batches so far, by reason, with the first of
            each.

    Raises: InputError if an argument is out of range, if shards match no file, or if files have
    fewer samples than a step of all ranks; ShardError if a shard has no sidecar or has changed
    since its sidecar was made. While iterating: ShardError if a teacher's features are missing, or
    those of too many samples are stale (see StaleCount), or a stream or disk fails after several
    tries; WorkerError if a loader process died (never while the caller uses a batch) or cannot send
    one; EmptyDataError if no sample is usable, or none of a worker's in EMPTY_EPOCHS epochs.
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
    _stale: StaleCount = field(default_factory=StaleCount, init=False)  # of this process

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
        self.shards_digest = digest_of([*zip(tars, map(size_of, self.sources))])
        self.division = PROCESSES  # until the samples are counted
        step = self.batch_size * self.batches_per_step
        self.division = choose_division(self._streams(), step)
        self.turn = 0  # the worker that yields the next batch
        self.positions = [Place(0, 0)] * max(1, self.workers)  # of each

    def _streams(self) -> Streams:
        """Returns the samples that each rank and worker reads."""
        read = partial(
            read_tar,
            sidecars=self.sidecars or None,
            max_bytes=self.max_bytes,
            on_error=self.on_error,
        )
        return Streams(
            self.sources,
            read,
            hold_out=self.hold_out,
            seed=self.seed,
            shuffle_buffer=self.shuffle_buffer if self.shuffle else 0,
            rank=self.rank,
            ranks=self.world_size,
            workers=max(1, self.workers),
            division=self.division,
        )

    def __iter__(self) -> Iterator[Batch]:
        """Yields batches without end, from the one after the last that was yielded.

        Starts the loader processes, which end with the iterator. Each batch moves the position that
        `state_dict` returns, and adds to `skipped`. Raises ShardError, EmptyDataError, WorkerError.
        """
        shared = self._streams().shared
        blocks = self._blocks()
        if shared:
            blocks = whole_batches(blocks, self.batch_size)
        for block in blocks:
            if shared:
                self.positions = [block.places[-1]] * self.workers
            else:
                self.positions[block.worker] = block.places[-1]
                self.turn = (block.worker + 1) % len(self.positions)
            yield block.batch

    def _blocks(self) -> Iterator[Block]:
        """Yields the blocks of the workers in turn, and adds their damage to `skipped`."""
        usable_epoch = self.positions[self.turn].epoch
        block: Block
        for block in from_workers(self.items, self.workers, self.pin_memory):
            if block.skipped is not None:
                self.skipped.merge(block.skipped)
            if block.places:
                usable_epoch = block.epoch
            elif block.epoch - usable_epoch >= EMPTY_EPOCHS:
                raise self._nothing_usable(block.worker, self.skipped)
            yield block

    def state_dict(self) -> dict[str, Any]:
        """Returns this rank's position after the last batch yielded, for `load_state_dict`.

        "rank", "world_size", "workers", "seed", "shards_digest" and "division" say whose position
        it is; "turn" is the worker that makes the next batch; "passes" and "consumed" are lists
        with each worker's epoch and the samples consumed in it.
        """
        epochs, consumed = map(list, zip(*self.positions))
        return {
            **self._state_owner(),
            "turn": self.turn,
            "passes": epochs,
            "consumed": consumed,
        }

    def _state_owner(self) -> dict[str, Any]:
        """Returns what a state must agree in: {name: value} of STATE_OWNER, digest, division."""
        names = (*STATE_OWNER, "shards_digest", "division")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets the position to `state`: iteration yields exactly the batches that would follow.

        state: from `state_dict`, also of another process. The samples before are read, but not
        decoded. Raises InputError for the state of another rank, seed, or number of ranks or
        workers, of other names, weights or sizes of shards, or of another division of the samples.
        """
        for name, value in self._state_owner().items():
            if state.get(name) != value:
                raise InputError(f"state: expected one of {name} {value}, got {state.get(name)}")
        self.turn = state["turn"]
        places = zip(state["passes"], state["consumed"], strict=True)
        self.positions = [Place(*place) for place in places]

    def items(self, process: int, workers: int) -> Iterator[Block]:
        """Yields the blocks of one loader process without end; of shared samples some are short.

        process: its number, 0 to workers - 1; the first one makes the next batch of the loader. The
        loader itself is not changed. Raises ShardError, and EmptyDataError as the class.
        """
        streams = self._streams()
        shared = streams.shared
        worker = (process + self.turn) % workers
        first_epoch, consumed_before = self.positions[worker]
        skipped = Skipped()
        rows: list[Prepared] = []  # of the next block
        places: list[Place] = []
        number = 0  # of the next sample of the stream
        empty = 0  # epochs in a row without a usable sample
        for epoch in itertools.count(first_epoch):
            samples = streams.epoch(epoch, worker, skipped)
            resumed = consumed_before > 0
            if resumed:
                deque(itertools.islice(samples, consumed_before), maxlen=0)
                # counted before the resume, but for the damage within the shuffle buffer
                skipped.take()
            consumed_before = 0
            first_number = number
            tried = usable = 0
            for consumed, sample in samples:
                if self.hold_out and is_held_out(sample, self.hold_out):
                    continue
                turn = number // self.batch_size % workers
                number += 1
                if shared and turn != worker:
                    continue
                tried += 1
                row = self._prepared(sample, epoch, skipped)
                if row is not None:
                    usable += 1
                    rows.append(row)
                    places.append(Place(epoch, consumed))
                block_ends = shared and number % self.batch_size == 0
                if block_ends or len(rows) == self.batch_size:
                    batch = self._collate(rows) if rows else {}
                    damage = skipped.take() if skipped.counts else None
                    yield Block(batch, places, worker, epoch, damage)
                    rows, places = [], []
            any_read = number > first_number
            others_had_all = any_read and not tried
            if not (usable or others_had_all or resumed):
                self._check_usable(epoch)
            if usable or (shared and any_read):  # others may have found usable ones
                empty = 0
            elif not resumed:
                empty += 1
            if empty == EMPTY_EPOCHS:
                raise self._nothing_usable(worker, skipped)

    def _check_usable(self, epoch: int) -> None:
        """Raises EmptyDataError if no sample of the sources is usable."""
        skipped = Skipped()
        order = [(source, 0) for source in self.sources]
        for sample in self._streams().in_training(order, skipped):
            if self._prepared(sample, epoch, skipped) is not None:
                return
        raise EmptyDataError(
            f"data: expected usable samples, got none in {in_words(self.sources)}; {skipped}"
        )

    def _nothing_usable(self, worker: int, skipped: Skipped) -> EmptyDataError:
        """Returns the error for a worker's stream without a usable sample; `skipped` has why."""
        streams = self._streams()
        number, count = streams.number(worker)
        reader = "rank" if streams.shared else "worker"
        fewer = "ranks" if streams.shared else "data.workers"
        return EmptyDataError(
            "data: expected usable samples for every loader process, got none in "
            f"{in_words(self.sources)} for {reader} {number + 1} of {count} in {EMPTY_EPOCHS} "
            f"epochs; fewer {fewer} or larger weights may help; {skipped}"
        )

    def _prepared(self, sample: Sample, epoch: int, skipped: Skipped) -> Prepared | None:
        """Returns what `_prepare` returns; None for a broken sample, which `skipped` then has."""
        try:
            prepared = self._prepare(sample, epoch)
        except BrokenSample as broken:
            skipped.add(broken.reason, described(sample), broken.detail)
            if isinstance(broken, StaleFeatures):
                self._stale.add(described(sample))
            return None
        if self.teacher:
            self._stale.add()
        return prepared

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
            "captions": list(captions),
        }
        if self.teacher:
            teacher_rows = torch.stack(features)
            batch["teacher_image"] = teacher_rows[:, 0]
            batch["teacher_text"] = teacher_rows[:, 1:] if several else teacher_rows[:, 1]
        return batch
