"""Held-out data: the images in stored order, decoded by several processes, with their captions, labels and places."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from simplclip.common import ranks
from simplclip.common.errors import InputError
from simplclip.data import tars
from simplclip.data.errors import BrokenSample, EmptyDataError, Skipped
from simplclip.data.files import IMAGE_SUFFIXES, captions_of, clean, file_bytes, record_of
from simplclip.data.loader import pixels_of, seeded
from simplclip.data.samples import Pair, check_files, image_of, label_of
from simplclip.data.sources import Source, in_words, sources_of
from simplclip.data.stored_order import StoredOrder
from simplclip.data.tars import Sample


@dataclass(frozen=True)
class Classes:
    """The classes of labelled data, by number: their names, their folders if each class has one, and prompt templates."""

    names: list[str] | None = None
    folders: tuple[str, ...] = ()
    templates: list[str] | None = None


@dataclass(frozen=True)
class ImageFolder:
    """A folder with a folder of images for each class. The key of an image is its path in the folder."""

    url: str
    paths: tuple[str, ...]
    classes: tuple[str, ...]

    def samples(self) -> Iterator[Sample]:
        """Yields the samples without the images, whose files `HeldOut.open` reads."""
        about = {"__url__": self.url, "__shard__": os.path.basename(self.url.rstrip(os.sep))}
        for path in self.paths:
            yield about | {"__key__": path, "__label__": self.classes.index(path.split(os.sep)[0])}


@dataclass
class HeldOut:
    """Held-out data, made by `held_out`. It is copied to the workers, each of which goes over all samples."""

    sources: Sequence[Source | ImageFolder]
    classes: Classes
    captions: int | None = None
    txt_lines: bool = False

    def __str__(self) -> str:
        return in_words(self.sources)

    def open(self, sample: Sample) -> Pair:
        """Parses the files of a sample. Raises BrokenSample."""
        if "__label__" in sample:
            try:
                sample = sample | {"jpg": file_bytes(os.path.join(sample["__url__"], sample["__key__"]))}
            except OSError as error:
                raise BrokenSample("cannot be read", error) from None
        check_files(sample)
        record = record_of(sample)
        label = label_of(sample, record)
        try:
            captions = captions_of(sample, record, txt_lines=self.txt_lines)[: self.captions or None]
            if self.captions is None and isinstance(record.get("captions"), list):
                captions = captions[:1]
        except BrokenSample as broken:
            if label is None or broken.args[0] not in ("missing caption", "empty caption"):
                raise
            captions = []
        url = os.path.abspath(sample["__url__"]) if type(sample["__url__"]) is str else sample["__url__"]
        return Pair(image_of(sample), captions, record, sample["__key__"], url, sample["__shard__"], label=label)

    def batches(
        self,
        transform: Callable,
        batch_size: int,
        skipped: Skipped,
        workers: int = 0,
        use: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> Iterator[tuple[torch.Tensor, list[int], list[Pair]]]:
        """Yields images [n, 3, S, S], n <= batch_size, uint8 or float32, their positions in the data, and their samples.

        The samples no longer have their images. Broken samples are left out and counted in `skipped`.
        transform: an ImageTransform, whose uint8 images still need its `finish`; or a function RGB -> float32 [3, S, S].
        use: function of the images whose result is yielded in their place, e.g. features. Ranks then divide the batches, and
            the first rank yields the results of all ranks.
        Raises ShardError for a shard that cannot be read, EmptyDataError if no sample is usable, WorkerError if a loader
        process died.
        """
        share = {"rank": ranks.number(), "world_size": ranks.count()} if use else {}
        order = StoredOrder(self.sources, _read, _Prepare(self, transform), batch_size, _collate, **share)
        read: Any = ((item.batch and (*item.batch, item.positions), item.skipped) for item in order.portions(workers))
        if use:
            read = ranks.gathered((batch and (use(batch[0]), *batch[1:]), new) for batch, new in read)
        any_usable = bool(use) and not ranks.first()
        for batch, new in read:
            skipped.merge(new)
            if batch is not None:
                any_usable = True
                images, pairs, positions = batch
                yield images, positions, pairs
        if not any_usable:
            raise EmptyDataError(f"{self} has no usable sample; {skipped}")

    def pictures(self, positions: Iterable[int]) -> dict[int, Image.Image]:
        """Returns the RGB images at these positions. The data before the last one are read again."""
        chosen, samples = set(positions), chain.from_iterable(_read(source, Skipped()) for source in self.sources)
        last = max(chosen, default=-1)
        return {n: self.open(sample).image for n, sample in enumerate(islice(samples, last + 1)) if n in chosen}


def held_out(what: Any, *, captions: int | None = None, name: str = "data") -> HeldOut:
    """Returns held-out data: tars as `sources_of` takes them, ImageFolder's layout, or clip-benchmark's.

    Of clip-benchmark's layout it takes the split `test`; name the folder of another one itself. A sample without caption and
    label is broken.

    captions: number of captions to use of each sample, from the first on; 0 for all. None for all, except that of a json's
    captions only the first counts, since the others may be rephrasings for training, or synthetic.
    Raises InputError if no data are found, or if a folder has another layout.
    """
    folder = os.path.expanduser(os.fspath(what)) if isinstance(what, (str, os.PathLike)) else ""
    if not os.path.isdir(folder):
        return HeldOut(sources_of(what, name), Classes(), captions)
    if (data := _clip_benchmark(Path(folder), captions, name)) is not None:
        return data
    images = _image_folder(folder, name)
    return HeldOut([images], Classes([clean(one.replace("_", " ")) for one in images.classes], images.classes), captions)


def _read(source: Source | ImageFolder, skipped: Skipped) -> Iterator[Sample]:
    return source.samples() if isinstance(source, ImageFolder) else tars.read(source, skipped)


@dataclass
class _Prepare:
    data: HeldOut
    transform: Callable

    def __call__(self, sample: Sample) -> tuple[torch.Tensor, Pair]:
        pair = self.data.open(sample)
        with seeded("eval", pair.place):
            image = pixels_of(self.transform, pair)
        return image, replace(pair, encoded=b"", record={} if pair.group is None else {"group": pair.group})


def _collate(prepared: list[tuple[torch.Tensor, Pair]]) -> tuple[torch.Tensor, list[Pair]]:
    images, pairs = zip(*prepared)
    return torch.stack(images), list(pairs)


def _image_folder(path: str, name: str) -> ImageFolder:
    classes = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    files = [file for folder in classes for file in sorted(Path(path, folder).rglob("*"))]
    if any(file.suffix.lower() in (".txt", ".json") for file in files):
        raise InputError(
            f"{name}: expected a folder of images by class, got {path!r} with texts beside the images; make shards "
            "of it by `simplclip data pack`"
        )
    paths = [str(file.relative_to(path)) for file in files if file.suffix.lower().removeprefix(".") in IMAGE_SUFFIXES]
    if not paths:
        raise InputError(
            f"{name}: expected a folder with a folder of images for each class, or of clip-benchmark's layout "
            f"(test/nshards.txt), got {path!r}; of a folder of images with captions `simplclip data pack` makes shards"
        )
    return ImageFolder(path, tuple(paths), tuple(classes))


def _clip_benchmark(folder: Path, captions: int | None, name: str) -> HeldOut | None:
    """Returns the data of a folder in clip-benchmark's layout, or of one of its splits; None for another layout."""
    root, place = (folder.parent, folder) if (folder / "nshards.txt").is_file() else (folder, folder / "test")
    if not (place / "nshards.txt").is_file():
        return None
    number = (place / "nshards.txt").read_text(errors="replace").strip()
    if not number.isdecimal() or len(number) > 9 or not int(number):
        raise InputError(f"{place / 'nshards.txt'}: expected the number of shards, got {number[:40]!r}")
    sources = sources_of((place / f"{shard}.tar" for shard in range(int(number))), name)
    names, templates = (_lines(root / file) for file in ("classnames.txt", "zeroshot_classification_templates.txt"))
    return HeldOut(sources, Classes(names, templates=templates), captions, txt_lines=True)


def _lines(file: Path) -> list[str] | None:
    if not file.is_file():
        return None
    try:
        return [clean(line) for line in file.read_text("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: expected UTF-8, got {error}") from None
