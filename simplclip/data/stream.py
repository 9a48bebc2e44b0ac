"""A held-out split as a stream: batches of images in the order of the split, decoded by several processes.

Batch b is made by worker b % W, so that neither the order nor the images depend on the number of workers. Memory does not
depend on the number of samples.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from simplclip.data.epoch import seeded
from simplclip.data.loader import EmptyEpochError, WorkerError
from simplclip.data.shards import BrokenSample, ShardError, Skipped, decode
from simplclip.data.workers import start_worker


@dataclass
class Entry:
    """A sample of a held-out split."""

    key: str
    encoded: Any  # the image file: bytes, or what reads them
    captions: list[str]  # may be empty if there is a label
    group: str | None = None  # samples of one group are all right; None: only itself
    label: str | int | None = None  # the class, or its number

    def picture(self) -> Image.Image:
        """The image, RGB. Raises BrokenSample."""
        return decode(_contents(self.encoded))


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


def _contents(value: Any) -> bytes:
    try:
        return Path(value).read_bytes() if isinstance(value, os.PathLike) else value
    except OSError as error:
        raise BrokenSample("missing image", error) from None


@dataclass
class Stream(IterableDataset):
    """The batches of a source; `batches` iterates over them."""

    source: Source
    transform: Callable[[Image.Image], torch.Tensor]  # RGB -> float32 [3, S, S]
    batch_size: int

    def batches(self, skipped: Skipped, workers: int = 0) -> Iterator[tuple[torch.Tensor, list[int], list[Entry]]]:
        """Yields images [n, 3, S, S], n <= batch_size, their positions in the source, and entries without images.

        Broken samples are left out and counted in `skipped`. Raises ShardError for a shard that cannot be opened,
        EmptyEpochError if no sample is usable, WorkerError if a loader process died.
        """
        options: dict[str, Any] = {"prefetch_factor": 2} if workers else {}
        if workers and sys.platform == "linux":
            options["multiprocessing_context"] = "fork"
        generator = torch.Generator()  # otherwise DataLoader would draw from the caller's global generator
        options |= {"num_workers": workers, "collate_fn": _unchanged, "worker_init_fn": start_worker}
        loader = DataLoader(self, batch_size=None, generator=generator, **options)
        found = False
        try:
            for item in loader:
                if isinstance(item, ShardError):
                    raise item
                batch, new = item
                skipped.merge(new)
                if batch is not None:
                    found = True
                    yield batch
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise WorkerError(f"workers: a loader process died: {str(error).strip()}") from error
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
                picture = entry.picture()
            except BrokenSample as broken:
                skipped.add(broken.args[0], place, broken.args[1])
                continue
            with seeded("eval", place):
                try:
                    images.append(self.transform(picture))
                except Exception as error:
                    message = f"the transform failed on sample {place!r}: {type(error).__name__}: {error}"
                    raise RuntimeError(message) from error
            entry.encoded = None
            positions.append(position)
            entries.append(entry)
        return (torch.stack(images), positions, entries) if images else None


def pictures(source: Source, positions: Iterable[int]) -> dict[int, Image.Image]:
    """The images at these positions of a source, RGB; no other image is read."""
    wanted = sorted(set(positions))
    found: dict[int, Image.Image] = {}
    items = enumerate(source.items(Skipped()))
    for target in wanted:
        item = next(item for position, item in items if position == target)
        found[target] = source.open(item).picture()
    return found


def _unchanged(item: Any) -> Any:
    return item
