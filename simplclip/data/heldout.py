"""Held-out data: the images in stored order, decoded by several processes, with their captions, labels and places.

Of k ranks with W workers each, rank b % k makes batch b in its worker (b // k) % W. So neither the order nor the images
depend on k or W. Memory does not depend on the number of samples.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from simplclip.common import ranks
from simplclip.common.errors import InputError
from simplclip.data.addresses import is_address
from simplclip.data.broken import BrokenSample, Skipped
from simplclip.data.decode import decode_pil
from simplclip.data.epoch import called, seeded
from simplclip.data.loader import EmptyEpochError
from simplclip.data.pairs import parts_of
from simplclip.data.parts import Classes, Part, in_words, read_part
from simplclip.data.shards import (
    IMAGE_SUFFIXES,
    Pair,
    Sample,
    ShardError,
    captions_of,
    contents,
    image_of,
    label_of,
    place_of,
    record_of,
)
from simplclip.data.tables import Options, Rows, merged
from simplclip.data.tar import Span
from simplclip.data.transforms import ImageTransform
from simplclip.data.workers import from_workers


@dataclass
class HeldOut:
    """Held-out data, made by `held_out`. It is copied to the workers, each of which goes over all samples."""

    parts: list[Part]
    classes: Classes
    captions: int | None = None
    bare: bool = False

    def __str__(self) -> str:
        return in_words(self.parts)

    def samples(self, skipped: Skipped) -> Iterator[Sample]:
        """Yields the samples in order. Local files, and members of local uncompressed tars, are Spans to read later."""
        for _, parts in itertools.groupby(self.parts, lambda part: part.url):
            several = list(parts)
            found = (sample for part in several for sample in read_part(part, skipped, every=True))
            yield from merged(found) if isinstance(several[0], Rows) and not self.bare else found

    def open(self, sample: Sample) -> Pair:
        """Reads the files of a sample. Raises BrokenSample."""
        url, image = sample["__url__"], image_of(sample)
        used = (*IMAGE_SUFFIXES, "json", "txt", "cls")
        files = contents({name: value for name, value in sample.items() if name in used or name.startswith("__")})
        try:
            found = self._described(files)
        except BrokenSample:
            if not self.bare:
                raise
            found = Pair(b"", [], {}, files)
        encoded: Any = image_of(files)
        if encoded is None:
            raise BrokenSample("missing image", "")
        found.encoded = encoded
        if isinstance(image, Span) and image.file != url:
            found.image_path = os.path.abspath(image.file)
        else:
            found.shard = url if is_address(url) else os.path.abspath(url)
        return found

    def _described(self, files: Sample) -> Pair:
        record = record_of(files)
        label = label_of(files, record)
        try:
            captions = captions_of(files, record, lines=True, first=self.captions is None)[: self.captions or None]
        except BrokenSample as broken:
            if label is None or broken.args[0] not in ("missing caption", "empty caption"):
                raise
            captions = []
        return Pair(b"", captions, record, files, label=label)

    def batches(
        self,
        transform: Callable,
        batch_size: int,
        skipped: Skipped,
        workers: int = 0,
        use: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> Iterator[tuple[torch.Tensor, list[int], list[Pair]]]:
        """Yields images [n, 3, S, S], n <= batch_size, uint8 or float32, their positions in the data, and their samples.

        The samples no longer have their files. Broken samples are left out and counted in `skipped`.
        transform: an ImageTransform, whose uint8 images still need its `finish`; or a function RGB -> float32 [3, S, S].
        use: function of the images whose result is yielded in their place, e.g. features. Ranks then divide the batches, and
            the first rank yields the results of all ranks.
        Raises ShardError for a shard that cannot be opened, EmptyEpochError if no sample is usable, WorkerError if a loader
        process died.
        """
        if any(is_address(part.url) for part in self.parts):  # every worker would fetch the whole stream
            workers = min(workers, 1)
        read = from_workers(_Batches(self, transform, batch_size, *((ranks.number(), ranks.count()) if use else ())), workers)
        if use:
            read = ranks.gathered((batch and (use(batch[0]), *batch[1:]), new) for batch, new in read)
        found = bool(use) and not ranks.first()
        for batch, new in read:
            skipped.merge(new)
            if batch is not None:
                found = True
                yield batch
        if not found:
            raise EmptyEpochError(f"{self} has no usable sample; {skipped}")

    def pictures(self, positions: Iterable[int]) -> dict[int, Image.Image]:
        """Returns the RGB images at these positions; no other image is decoded."""
        found: dict[int, Image.Image] = {}
        samples = enumerate(self.samples(Skipped()))
        for target in sorted(set(positions)):
            sample = next(sample for position, sample in samples if position == target)
            found[target] = decode_pil(self.open(sample).encoded)
        return found


def held_out(
    what: Any, *, captions: int | None = None, images: str | os.PathLike | None = None, bare: bool = False, name: str = "data"
) -> HeldOut:
    """Returns held-out data from all that `parts_of` takes. Of several splits it takes `test`, unless DATA#SPLIT names one.

    Rows of a table with the same image are one sample with several captions. A sample without caption and label is broken.

    captions: number of captions to use of each sample, from the first on; 0 for all. None for all, except that of a json's
    captions only the first counts, since the others may be rephrasings for training, or synthetic.
    images: folder of the images that a table or JSON names, by default the folder of that file.
    bare: only images count. No sample is left out for a missing caption and label, or for a broken json or txt, and rows of a
    table with the same image stay separate samples.
    Raises InputError if no data are found, a file has contents of another kind, or parts have different classes.
    """
    folder = None if images is None else os.fspath(images)
    parts = parts_of(what, name, Options(images=folder, split="test"))
    classes = [part.classes for part in parts if part.classes]
    if any(one != classes[0] for one in classes):
        raise InputError(f"{name}: expected data with the same classes, got {classes[0].names} and others")
    return HeldOut(parts, classes[0] if classes else Classes(), captions, bare)


@dataclass
class _Batches(IterableDataset):
    data: HeldOut
    transform: Callable
    batch_size: int
    rank: int = 0
    ranks: int = 1

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        number, count = number * self.ranks + self.rank, count * self.ranks
        skipped = Skipped()
        samples = enumerate(self.data.samples(skipped if number == 0 else Skipped()))
        try:
            for index in itertools.count():
                some = list(itertools.islice(samples, self.batch_size))
                if not some:
                    break
                if index % count == number:
                    yield self._batch(some, skipped), skipped.take()
        except ShardError as error:
            yield error  # raised in the main process, without the worker's traceback
        yield None, skipped

    def _batch(self, some: list[tuple[int, Sample]], skipped: Skipped) -> tuple | None:
        images, positions, found = [], [], []
        for position, sample in some:
            place = place_of(sample)
            try:
                opened = self.data.open(sample)
                with seeded("eval", place):
                    images.append(self._pixels(opened.encoded, place))
            except BrokenSample as broken:
                skipped.add(broken.args[0], place, broken.args[1])
                continue
            positions.append(position)
            found.append(opened.without_files())
        return (torch.stack(images), positions, found) if images else None

    def _pixels(self, encoded: bytes, place: str) -> torch.Tensor:
        if isinstance(self.transform, ImageTransform):
            return self.transform(encoded)
        return called(self.transform, decode_pil(encoded), repr(place))
