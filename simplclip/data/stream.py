"""A held-out split as a stream: batches of images in the order of the split, decoded by several processes.

Batch b is made by worker b % W, so that neither the order nor the images depend on the number of workers. Memory does not
depend on the number of samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from simplclip.data.broken import BrokenSample, Skipped
from simplclip.data.decode import decode_pil
from simplclip.data.epoch import called, seeded
from simplclip.data.loader import EmptyEpochError
from simplclip.data.shards import ShardError
from simplclip.data.transforms import ImageTransform
from simplclip.data.workers import from_workers


@dataclass
class Entry:
    """A sample of a held-out split."""

    key: str
    encoded: bytes  # the image file
    captions: list[str]  # may be empty if there is a label
    group: str | None = None  # samples of one group are all right; None: only itself
    label: str | int | None = None  # the class, or its number
    shard: str = ""  # where its image lies: the tar, absolute unless it is streamed,
    image_path: str = ""  # or a file of its own


class Source(Protocol):
    """Where a split is read from. It is copied to the workers, each of which goes over all items and opens its own."""

    classes: list[str] | None  # names of the classes by number, if labels are numbers
    templates: list[str] | None  # phrases for them

    def __str__(self) -> str: ...

    def items(self, skipped: Skipped) -> Iterable[Any]:
        """The samples in order, without their images where that saves reading."""

    def open(self, item: Any) -> Entry:
        """Raises BrokenSample."""

    def place(self, item: Any) -> str:
        """What messages call the item, and its transform is seeded by."""


@dataclass
class Stream(IterableDataset):
    """The batches of a source; `batches` iterates over them."""

    source: Source
    transform: Callable  # an ImageTransform, which leaves uint8 to `finish`; or RGB -> float32 [3, S, S]
    batch_size: int

    def batches(self, skipped: Skipped, workers: int = 0) -> Iterator[tuple[torch.Tensor, list[int], list[Entry]]]:
        """Yields images [n, 3, S, S], n <= batch_size, uint8 or float32, their positions in the source, and their entries.

        The entries have no image any more. Broken samples are left out and counted in `skipped`.
        Raises ShardError for a shard that cannot be opened, EmptyEpochError if no sample is usable, WorkerError if a loader
        process died.
        """
        if getattr(self.source, "streamed", False):  # every worker would fetch all of it
            workers = min(workers, 1)
        found = False
        for batch, new in from_workers(self, workers):
            skipped.merge(new)
            if batch is not None:
                found = True
                yield batch
        if not found:
            raise EmptyEpochError(f"{self.source} has no usable sample; {skipped}")

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        skipped = Skipped()
        items = iter(enumerate(self.source.items(skipped if number == 0 else Skipped())))
        try:
            for index in itertools.count():
                part = list(itertools.islice(items, self.batch_size))
                if not part:
                    break
                if index % count == number:
                    yield self._batch(part, skipped), skipped.take()
        except ShardError as error:
            yield error  # raised in the main process, without the worker's traceback
        yield None, skipped

    def _batch(self, part: list[tuple[int, Any]], skipped: Skipped) -> tuple | None:
        images, positions, entries = [], [], []
        for position, item in part:
            place = self.source.place(item)
            try:
                entry = self.source.open(item)
                with seeded("eval", place):
                    images.append(self._pixels(entry.encoded, place))
            except BrokenSample as broken:
                skipped.add(broken.args[0], place, broken.args[1])
                continue
            entry.encoded = b""
            positions.append(position)
            entries.append(entry)
        return (torch.stack(images), positions, entries) if images else None

    def _pixels(self, encoded: bytes, place: str) -> torch.Tensor:
        if isinstance(self.transform, ImageTransform):
            return self.transform(encoded)
        return called(self.transform, decode_pil(encoded), repr(place))


def pictures(source: Source, positions: Iterable[int]) -> dict[int, Image.Image]:
    """The images at these positions of a source, RGB; no other image is read."""
    wanted = sorted(set(positions))
    found: dict[int, Image.Image] = {}
    items = enumerate(source.items(Skipped()))
    for target in wanted:
        item = next(item for position, item in items if position == target)
        found[target] = decode_pil(source.open(item).encoded)
    return found
