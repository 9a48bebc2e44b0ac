"""What a worker does in an epoch: it orders samples by seed, draws captions, augments images and makes batches."""

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info
from webdataset import filters

from simplclip.data.broken import BrokenSample, Skipped
from simplclip.data.decode import decode_pil, size_of
from simplclip.data.parts import Part, read_part
from simplclip.data.shards import UNREADABLE, Pair, Sample, ShardError, parse, place_of, prefix_output, stable_hash
from simplclip.data.sidecars import PREFIX, Folders
from simplclip.data.tar import MAX_BYTES, Span
from simplclip.data.transforms import ImageTransform, View, stack

_NUMPY_GENERATOR = np.random.MT19937(0)

Batch = dict[str, Any]


@dataclass
class Progress:
    """What one worker has done of an epoch, so that another process can go on without decoding what is done."""

    items: int = 0  # that it gave
    lost: set[int] = field(default_factory=set)  # places of broken samples in the worker's order
    ended: dict[int, int] = field(default_factory=dict)  # place of a part that is read -> the samples that it gave
    current: tuple[int, int] = (-1, 0)  # the place of the part that is being read, and the samples that it gave


class Item(NamedTuple):
    """What a worker gives: a batch, and what happened since the former one."""

    batch: Batch | None  # None if it is skipped
    size: int
    last: bool
    worker: int
    skipped: Skipped
    lost: list[int]
    ended: dict[int, int]
    current: tuple[int, int]


@contextlib.contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """Seeds the global generators that transforms use by `parts`, and restores them afterwards."""
    seed = stable_hash("/".join(map(str, parts)))
    states = torch.get_rng_state(), random.getstate(), np.random.get_bit_generator()
    # torch.manual_seed would also seed the GPU's generators.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.set_bit_generator(_NUMPY_GENERATOR)  # 30 times cheaper than saving and restoring the state
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_bit_generator(states[2])


def pixels_of(
    transform: ImageTransform | Callable,
    sample: Pair,
    view: View | None = None,
    max_pixels: int | None = None,
) -> tuple[torch.Tensor, list[float] | None]:
    """The transformed image of a sample, and the change of colour that is left to `ImageTransform.finish`.

    view: which one, instead of one that is drawn. max_pixels: as for `decode`, of images for a caller's transform.
    Raises BrokenSample, ShardError for a caller's transform if there is a view, and RuntimeError for its errors.
    """
    if isinstance(transform, ImageTransform):
        if view is None:
            view = transform.draw(*size_of(sample.encoded, transform.max_pixels))
        return transform.apply(sample.encoded, view), view.get("colour")
    if view is not None:
        raise ShardError(
            f"sample {sample.place!r} has the views that a teacher saw, which only simplclip's ImageTransform replays, "
            f"got {transform!r}"
        )
    image = sample.image if max_pixels is None else decode_pil(sample.encoded, max_pixels=max_pixels)
    return called(transform, image, f"{sample.files['__key__']!r} of shard {sample.files['__url__']!r}"), None


def called(transform: Callable, image: Image.Image, place: str) -> torch.Tensor:
    """What a caller's transform makes of an image; its errors become a RuntimeError that names the sample."""
    try:
        return transform(image)
    except Exception as error:
        raise RuntimeError(f"the transform failed on sample {place}: {type(error).__name__}: {error}") from error


@dataclass
class Epoch(IterableDataset):
    """Yields what one worker reads in one epoch."""

    parts: list[Part]
    tokenizer: Callable
    transform: Callable
    batch_size: int
    captions: int
    shuffle: bool
    shuffle_buffer: int
    seed: int
    teacher: bool
    on_error: str
    sidecars: Folders = ()
    max_pixels: int | None = None
    max_bytes: int = MAX_BYTES
    prefix: tuple[int, ...] | None = None  # the shape of stored outputs, which are read in place of images
    epoch: int = 0
    progress: list[Progress] | None = None  # of each worker, to go on from

    def __iter__(self) -> Iterator[Item | tuple[ShardError]]:
        worker = get_worker_info()
        try:
            yield from self._items(*((worker.id, worker.num_workers) if worker else (0, 1)))
        except ShardError as error:
            yield (error,)  # raised in the main process, without the worker's traceback

    def _items(self, worker: int, workers: int) -> Iterator[Item]:
        done = self.progress[worker] if self.progress else Progress()
        skipped, lost = Skipped(), []
        reading = _Reading(self, done, skipped, counts=len(self.parts) >= workers or worker == 0)
        samples = reading.samples(worker, workers)
        if self.shuffle:
            rng = random.Random(f"{self.seed}/{self.epoch}/{worker}/{workers}")
            samples = filters.shuffle(self.shuffle_buffer, initial=self.shuffle_buffer, rng=rng)(samples)
        number, pending = 0, []

        def prepare(place: int, sample: Sample) -> Iterator[tuple]:
            try:
                yield self._prepare(sample)
            except BrokenSample as broken:
                if self.on_error == "stop" and broken.args[0] == UNREADABLE:
                    raise ShardError(f"sample {place_of(sample)!r} {UNREADABLE}: {broken.args[1]}") from None
                lost.append(place)
                skipped.add(broken.args[0], place_of(sample), broken.args[1])

        def item(batch: Batch | None, last: bool) -> Item:
            found = Item(batch, len(pending), last, worker, skipped.take(), lost.copy(), *reading.take())
            lost.clear()
            return found

        for place, sample in enumerate(samples):
            skip = number < done.items
            if not skip:
                pending.extend(prepare(place, sample))
            elif place not in done.lost:
                pending.append((place, sample))
            if len(pending) == self.batch_size:
                yield item(None if skip else self._collate(pending), False)
                pending = []
                number += 1
        if number < done.items:  # the last, smaller batch is joined with those of other workers
            pending = [prepared for skipped_one in pending for prepared in prepare(*skipped_one)]
        yield item(self._collate(pending) if pending else None, True)

    def _prepare(self, sample: Sample) -> tuple:
        stored = self.prefix is not None and PREFIX in sample
        opened = parse(sample, self.teacher, image=not stored, max_bytes=self.max_bytes)
        if self.prefix is not None and not stored:
            decode_pil(opened.encoded, max_pixels=self.max_pixels)  # a broken image has no output
            raise ShardError(f"sample {opened.place!r} has no {PREFIX}; remove the folder data.cache_prefix to make it again")
        with seeded(self.seed, self.epoch, opened.place, *filter(None, (sample.get("__copy__"),))):
            drawn = _draw(len(opened.captions), self.captions)
            number = random.randrange(len(opened.views)) if opened.views else 0
            view = opened.views[number] if opened.views else None
            if self.prefix is not None:
                output = prefix_output(sample, self.prefix, number, len(opened.views or [None]))
                pixels, colour = torch.from_numpy(output.copy()), None
            else:
                pixels, colour = pixels_of(self.transform, opened, view, self.max_pixels)
        texts = [opened.captions[i] for i in drawn]
        features = None
        if self.teacher:
            captions = len(opened.features) - len(opened.captions)  # where those of captions begin
            features = torch.from_numpy(opened.features[[number, *(captions + i for i in drawn)]])
            features = features.view(torch.bfloat16) if features.dtype == torch.uint16 else features
        return pixels, colour, texts, opened.group_id, sample["__key__"], opened.record, features

    def _collate(self, prepared: list[tuple]) -> Batch:
        images, colours, texts, groups, keys, records, features = zip(*prepared)
        one = self.captions == 1
        tokens = self.tokenizer([text for several in texts for text in several])
        batch: Batch
        if self.prefix is not None:
            batch = {"prefix": torch.stack(images)}
        else:
            batch = {"image": stack(images) if images[0].dtype == torch.uint8 else torch.stack(images)}
        batch |= {
            "text": tokens if one else tokens.unflatten(0, (-1, self.captions)),
            "group": torch.tensor(groups, dtype=torch.int64),
            "key": list(keys),
            "meta": list(records),
        }
        if colours[0] is not None:
            batch["colour"] = torch.tensor(colours)
        if self.teacher:
            stacked = torch.stack(features)
            batch |= {"teacher_image": stacked[:, 0], "teacher_text": stacked[:, 1] if one else stacked[:, 1:]}
        return batch


def _draw(count: int, wanted: int) -> list[int]:
    """Draws `wanted` of `count` captions at random, different ones if there are enough."""
    drawn: list[int] = []
    while len(drawn) < wanted:
        drawn += random.sample(range(count), min(count, wanted - len(drawn)))
    return drawn


class _Reading:
    """The samples of one worker before they are shuffled, and how many each part gave."""

    def __init__(self, epoch: Epoch, done: Progress, skipped: Skipped, counts: bool):
        self.epoch, self.done = epoch, done
        self.skipped = skipped if counts else Skipped()
        self.ended: dict[int, int] = {}
        self.current = (-1, 0)

    def take(self) -> tuple[dict[int, int], tuple[int, int]]:
        """The parts that ended since the last call, and the current one."""
        ended, self.ended = self.ended, {}
        return ended, self.current

    def samples(self, worker: int, workers: int) -> Iterator[Sample]:
        e = self.epoch
        parts = [(part, copy) for part in e.parts for copy in range(math.ceil(part.weight))]
        if e.shuffle:
            random.Random(f"{e.seed}/{e.epoch}").shuffle(parts)
        parts = list(enumerate(parts))
        if len(parts) >= workers:
            return (sample for place, part in parts[worker::workers] for sample in self._part(place, *part))
        # With fewer parts than workers, each worker reads all of them and takes its share of the samples.
        return islice((sample for place, part in parts for sample in self._part(place, *part)), worker, None, workers)

    def _part(self, place: int, part: Part, copy: int) -> Iterator[Sample]:
        ended = self.done.ended.get(place)
        known = self.done.current[1] if place == self.done.current[0] else ended or 0
        given = 0
        for given, sample in enumerate(islice(self._read(part, part.weight - copy, known), ended), 1):
            self.current = place, given
            if copy:
                sample["__copy__"] = copy
            yield sample
        # Samples that an earlier process has read from a part that is gone now keep their places in the order.
        for gone in range(given + 1, known + 1):
            self.current = place, gone
            yield {"__key__": f"sample {gone}", "__url__": part.url, "png": Span(part.url, 0, 1)}
        if ended is None:
            self.ended[place] = max(given, known)

    def _read(self, part: Part, share: float, known: int) -> Iterator[Sample]:
        """A random share of the samples of a part; all for 1 and above.

        What is counted before `known` of them were given was counted by an earlier process.
        """
        given, skipped, seed = 0, Skipped(), f"{self.epoch.seed}/{self.epoch.epoch}"
        try:
            options = {"sidecars": self.epoch.sidecars, "max_bytes": self.epoch.max_bytes}
            for sample in read_part(part, skipped, ahead=not known, **options):
                if skipped.counts:
                    counted = skipped.take()
                    if given >= known:
                        self.skipped.merge(counted)
                if share < 1 and stable_hash(f"{seed}/{place_of(sample)}") >= share * 2**64:
                    continue
                given += 1
                yield sample
        except ShardError as error:
            if self.epoch.on_error == "stop":
                raise
            skipped.add("unreadable shard", part.name, error)
        self.skipped.merge(skipped)
