"""The work of one loader process in an epoch: orders samples by seed, draws captions, augments images and makes batches."""

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
from simplclip.data.decode import decode_pil
from simplclip.data.parts import Part, read_part
from simplclip.data.shards import UNREADABLE, Pair, Sample, ShardError, parse, place_of, prefix_output, stable_hash
from simplclip.data.sidecars import PREFIX, Folders
from simplclip.data.tar import MAX_BYTES
from simplclip.data.transforms import ImageTransform, View, stack

_NUMPY: Any = np.random  # Any, since numpy's types leave out the global bit generator
_NUMPY_GENERATOR = np.random.MT19937(0)

Batch = dict[str, Any]


@dataclass
class Position:
    """The progress of one worker in an epoch. Another process can go on from there without decoding the samples before.

    torchdata's StatefulDataLoader would only carry this object from the workers to the trainer (about 40 lines). Reading,
    skipping, joining the last batches and restarting dead workers would stay, and it is built on torch's private names.
    """

    items: int = 0  # number of items that the worker has yielded
    lost: set[int] = field(default_factory=set)  # places of broken samples in the worker's order of samples


@dataclass(frozen=True)
class Share:
    """One rank's share of the decoding: its rows of every batch. All ranks read all samples, in the same order.

    exchange: exchange(name, value) returns the values that all ranks gave under this name. So each rank learns which samples
        are broken on other ranks, and a batch has the same samples for any number of ranks.
    """

    rank: int
    ranks: int
    exchange: Callable[[str, Any], list[Any]]

    def rows(self, size: int) -> slice:
        each = size // self.ranks
        return slice(self.rank * each, self.rank * each + each)


class WorkerItem(NamedTuple):
    """An item that a worker yields: a batch, and the broken samples since the worker's last item."""

    batch: Batch | None  # None if an earlier process yielded it, or if no samples are left at the end
    size: int
    last: bool
    worker: int
    skipped: Skipped
    lost: list[int]


@contextlib.contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """Seeds the global generators that transforms use by `parts`, and restores them afterwards."""
    seed = stable_hash("/".join(map(str, parts)))
    states = torch.get_rng_state(), random.getstate(), _NUMPY.get_bit_generator()
    # torch.manual_seed would also seed the GPU's generators.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    _NUMPY.set_bit_generator(_NUMPY_GENERATOR)  # 30 times cheaper than saving and restoring the state
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        _NUMPY.set_bit_generator(states[2])


def pixels_of(
    transform: ImageTransform | Callable,
    sample: Pair,
    view: View | None = None,
    max_pixels: int | None = None,
) -> tuple[torch.Tensor, list[float] | None]:
    """Returns the transformed image of a sample, and the parameters with which `ImageTransform.finish` changes its colour.

    view: the view to replay instead of drawing one. max_pixels: as for `decode`, for a caller's transform only.
    Raises BrokenSample. With a caller's transform, raises ShardError if a view is given, RuntimeError if the transform fails.
    """
    if isinstance(transform, ImageTransform):
        encoded = sample.encoded
        pixels, view = transform.drawn(encoded) if view is None else (transform.apply(encoded, view), view)
        return pixels, view.get("colour")
    if view is not None:
        raise ShardError(
            f"sample {sample.place!r} has the views that a teacher saw, which only simplclip's ImageTransform replays, "
            f"got {transform!r}"
        )
    image = sample.image if max_pixels is None else decode_pil(sample.encoded, max_pixels=max_pixels)
    return called(transform, image, f"{sample.files['__key__']!r} of shard {sample.files['__url__']!r}"), None


def called(transform: Callable, image: Image.Image, place: str) -> torch.Tensor:
    """Applies a caller's transform to an image. Its errors become a RuntimeError that names the sample."""
    try:
        return transform(image)
    except Exception as error:
        raise RuntimeError(f"the transform failed on sample {place}: {type(error).__name__}: {error}") from error


@dataclass
class Epoch(IterableDataset):
    """Data set of one epoch, which yields the items of one worker, or the ShardError that ends them."""

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
    share: Share | None = None
    epoch: int = 0
    positions: list[Position] | None = None  # the position of each worker from which to go on

    def __iter__(self) -> Iterator[WorkerItem | ShardError]:
        worker = get_worker_info()
        try:
            yield from self._items(*((worker.id, worker.num_workers) if worker else (0, 1)))
        except ShardError as error:
            yield error  # raised in the main process, without the worker's traceback

    def _items(self, worker: int, workers: int) -> Iterator[WorkerItem]:
        done = self.positions[worker] if self.positions else Position()
        skipped = Skipped()
        lost: list[int] = []  # places of broken samples since the last item
        pending: list[Any] = []  # samples of the next batch: prepared, or (place, sample) if it is skipped or shared
        ready: dict[int, list[tuple]] = {}  # samples of a shared batch that this rank has prepared, by place
        number = 0  # items yielded so far, skipped ones included

        def prepare(place: int, sample: Sample, skipped: Skipped = skipped) -> Iterator[tuple]:
            try:
                yield self._prepare(sample)
            except BrokenSample as broken:
                if self.on_error == "stop" and broken.args[0] == UNREADABLE:
                    raise ShardError(f"sample {place_of(sample)!r} {UNREADABLE}: {broken.args[1]}") from None
                lost.append(place)
                skipped.add(broken.args[0], place_of(sample), broken.args[1])

        def item(batch: Batch | None, last: bool) -> WorkerItem:
            new = skipped.take()
            if number < done.items:  # counted when an earlier process yielded the item
                new = Skipped()
            found = WorkerItem(batch, len(pending), last, worker, new, lost.copy())
            lost.clear()
            return found

        def own() -> list[tuple] | None:
            """Returns this rank's rows of `pending`; None if any rank found broken samples, which are then removed."""
            rows, broken, known = pending[self.share.rows(len(pending))], Skipped(), len(lost)
            for place, sample in rows:
                if place not in ready:
                    ready[place] = list(prepare(place, sample, broken))
            mine = place_of(pending[-1][1]), lost[known:], broken
            said = self.share.exchange(f"{self.epoch}/{worker}/{number}/{known}", mine)
            if len({end for end, *_ in said}) > 1:
                ends = ", ".join(repr(end) for end, *_ in said)
                raise ShardError(f"the ranks read different samples, which must be the same: a batch ends at {ends}")
            lost[known:] = [place for _, places, _ in said for place in places]
            for *_, counted in said:
                skipped.merge(counted)
            if len(lost) == known:
                return [ready[place][0] for place, _ in rows]
            pending[:] = [(place, sample) for place, sample in pending if place not in lost]
            return None

        samples = self._samples(worker, workers, skipped, ahead=lambda: number >= done.items)
        if self.shuffle:
            rng = random.Random(f"{self.seed}/{self.epoch}/{worker}/{workers}")
            samples = filters.shuffle(self.shuffle_buffer, initial=self.shuffle_buffer, rng=rng)(samples)
        for place, sample in enumerate(samples):
            skip = number < done.items
            if not (skip or self.share):
                pending.extend(prepare(place, sample))
            elif place not in done.lost:
                pending.append((place, sample))
            if len(pending) == self.batch_size:
                prepared = own() if self.share and not skip else pending
                if prepared is None:
                    continue
                yield item(None if skip else self._collate(prepared), False)
                pending, ready = [], {}
                number += 1
        # The loader joins the workers' last, smaller batches, so each rank makes all of this one, even if it is skipped.
        if self.share or number < done.items:
            pending = [prepared for place, sample in pending for prepared in prepare(place, sample)]
        yield item(self._collate(pending) if pending else None, True)

    def _samples(self, worker: int, workers: int, skipped: Skipped, ahead: Callable[[], bool]) -> Iterator[Sample]:
        """Yields the samples of one worker before they are shuffled. ahead: tells whether their files will be used soon."""
        parts = [(part, copy) for part in self.parts for copy in range(math.ceil(part.weight))]
        if self.shuffle:
            random.Random(f"{self.seed}/{self.epoch}").shuffle(parts)
        if len(parts) >= workers:
            return (sample for part, copy in parts[worker::workers] for sample in self._read(part, copy, skipped, ahead()))
        # With fewer parts than workers, each worker reads all parts and takes its share; only the first one counts damage.
        skipped = skipped if worker == 0 else Skipped()
        samples = (sample for part, copy in parts for sample in self._read(part, copy, skipped, ahead()))
        return islice(samples, worker, None, workers)

    def _read(self, part: Part, copy: int, skipped: Skipped, ahead: bool) -> Iterator[Sample]:
        """Yields the samples of a part. If the weight is no whole number, the last copy is a random share of the samples."""
        share, seed = part.weight - copy, f"{self.seed}/{self.epoch}"
        try:
            for sample in read_part(part, skipped, ahead=ahead, sidecars=self.sidecars, max_bytes=self.max_bytes):
                if share < 1 and stable_hash(f"{seed}/{place_of(sample)}") >= share * 2**64:
                    continue
                if copy:
                    sample["__copy__"] = copy
                yield sample
        except ShardError as error:
            if self.on_error == "stop":
                raise
            skipped.add("unreadable shard", part.name, error)

    def _prepare(self, sample: Sample) -> tuple:
        stored = self.prefix is not None and PREFIX in sample
        opened = parse(sample, self.teacher, image=not stored, max_bytes=self.max_bytes)
        if self.prefix is not None and not stored:
            decode_pil(opened.encoded, max_pixels=self.max_pixels)  # raises BrokenSample: a broken image has no output
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
            captions = len(opened.features) - len(opened.captions)  # the row where the captions' features begin
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
