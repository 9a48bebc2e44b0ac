"""Held-out data: the images in stored order, decoded by several processes, with their captions, labels and places."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from simplclip.common import ranks
from simplclip.common.errors import InputError
from simplclip.data import tars
from simplclip.data.decode import decode_pil
from simplclip.data.errors import BrokenSample, EmptyDataError, Skipped
from simplclip.data.loader import called, seeded
from simplclip.data.samples import Pair, check_files, file_bytes, image_of, label_of
from simplclip.data.sources import Source, in_words, sources_of
from simplclip.data.stored_order import StoredOrder, workers_for
from simplclip.data.tars import Sample
from simplclip.data.text import IMAGE_SUFFIXES, captions_of, clean, record_of
from simplclip.data.transforms import ImageTransform


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

    def read(self, skipped: Skipped, wanted: Callable[[int], bool]) -> Iterator[Sample]:
        numbers = {name: number for number, name in enumerate(self.classes)}
        for number, path in enumerate(self.paths):
            sample: Sample = {"__key__": path, "__url__": self.url, "__shard__": os.path.basename(self.url.rstrip(os.sep))}
            sample["__label__"] = numbers[path.split(os.sep)[0]]
            sample["jpg"] = _image(os.path.join(self.url, path)) if wanted(number) else b""
            yield sample


@dataclass
class HeldOut:
    """Held-out data, made by `held_out`. It is copied to the workers, each of which goes over all samples."""

    sources: list[Source | ImageFolder]
    classes: Classes
    captions: int | None = None
    txt_lines: bool = False

    def __str__(self) -> str:
        return in_words(self.sources)

    def open(self, sample: Sample) -> Pair:
        """Parses the files of a sample. Raises BrokenSample."""
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
        workers = workers_for([source.url for source in self.sources], workers)
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
        """Returns the RGB images at these positions; no other image is read."""
        chosen = set(positions)
        pictures: dict[int, Image.Image] = {}
        position = 0
        for source in self.sources:

            def wanted(number: int, start: int = position) -> bool:
                return start + number in chosen

            for sample in _read(source, Skipped(), wanted):
                if position in chosen:
                    pictures[position] = decode_pil(image_of(sample))
                position += 1
            if len(pictures) == len(chosen):
                break
        return pictures


def held_out(what: Any, *, captions: int | None = None, name: str = "data") -> HeldOut:
    """Returns held-out data: tars as `sources_of` takes them, ImageFolder's layout, or clip-benchmark's.

    Of several splits in clip-benchmark's layout it takes `test`, unless FOLDER#SPLIT names one. A sample without caption and
    label is broken.

    captions: number of captions to use of each sample, from the first on; 0 for all. None for all, except that of a json's
    captions only the first counts, since the others may be rephrasings for training, or synthetic.
    Raises InputError if no data are found, or if a folder has another layout.
    """
    folder = os.path.expanduser(os.fspath(what)) if isinstance(what, (str, os.PathLike)) else ""
    place, _, split = folder.rpartition("#")
    if folder and not os.path.exists(folder) and os.path.isdir(place):
        folder = place
    else:
        split = ""
    if not os.path.isdir(folder):
        return HeldOut(list(sources_of(what, name)), Classes(), captions)
    split_folder = _clip_benchmark_split(Path(folder), split, name)
    if split_folder is None:
        found = _image_folder(folder, name)
        return HeldOut([found], Classes([clean(one.replace("_", " ")) for one in found.classes], found.classes), captions)
    return _clip_benchmark(split_folder, Path(folder), captions, name)


def _read(source: Any, skipped: Skipped, wanted: Callable[[int], bool]) -> Iterator[Sample]:
    if isinstance(source, ImageFolder):
        return source.read(skipped, wanted)
    return tars.read(source, skipped, wanted=wanted)


@dataclass
class _Prepare:
    data: HeldOut
    transform: Callable

    def __call__(self, sample: Sample) -> tuple[torch.Tensor, Pair]:
        pair = self.data.open(sample)
        with seeded("eval", pair.place):
            if isinstance(self.transform, ImageTransform):
                image = self.transform(pair.encoded)
            else:
                image = called(self.transform, decode_pil(pair.encoded), pair)
        return image, replace(pair, encoded=b"", record={} if pair.group is None else {"group": pair.group})


def _collate(prepared: list[tuple[torch.Tensor, Pair]]) -> tuple[torch.Tensor, list[Pair]]:
    images, pairs = zip(*prepared)
    return torch.stack(images), list(pairs)


def _image(path: str) -> bytes | BrokenSample:
    try:
        return file_bytes(path)
    except OSError as error:
        return BrokenSample("cannot be read", error)
    except BrokenSample as broken:
        return broken


def _image_folder(path: str, name: str) -> ImageFolder:
    classes = tuple(sorted(entry.name for entry in os.scandir(path) if entry.is_dir()))
    suffixes = tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)
    paths: list[str] = []
    for one in classes:
        for place, folders, files in os.walk(os.path.join(path, one)):
            folders.sort()
            if any(file.lower().endswith((".txt", ".json")) for file in files):
                raise InputError(
                    f"{name}: expected a folder of images by class, got {path!r} with texts beside the images; make shards "
                    "of it by `simplclip data pack`"
                )
            relative = os.path.relpath(place, path)
            paths += [os.path.join(relative, file) for file in sorted(files) if file.lower().endswith(suffixes)]
    if not paths:
        raise InputError(
            f"{name}: expected a folder with a folder of images for each class, or of clip-benchmark's layout "
            f"(test/nshards.txt), got {path!r}; of a folder of images with captions `simplclip data pack` makes shards"
        )
    return ImageFolder(path, tuple(paths), classes)


def _clip_benchmark_split(folder: Path, split: str, name: str) -> Path | None:
    """Returns the folder of a split in clip-benchmark's layout; None for another layout."""
    splits = [entry.name for entry in sorted(folder.iterdir()) if (entry / "nshards.txt").is_file()]
    if split and split not in splits:
        raise InputError(f"{name}: expected one of the splits {', '.join(splits) or '(none)'} of {folder}, got {split!r}")
    if split or splits:
        if not split and len(splits) > 1 and "test" not in splits:
            raise InputError(f"{name}: expected one of the splits {', '.join(splits)}, as {folder}#{splits[0]}, got none")
        return folder / (split or ("test" if "test" in splits else splits[0]))
    return folder if (folder / "nshards.txt").is_file() else None


def _clip_benchmark(place: Path, folder: Path, captions: int | None, name: str) -> HeldOut:
    root = place.parent if place == folder else folder
    number = (place / "nshards.txt").read_text(errors="replace").strip()
    if not number.isdecimal() or len(number) > 9 or not int(number):
        raise InputError(f"{place / 'nshards.txt'}: expected the number of shards, got {number[:40]!r}")
    kind = _lines(root / "dataset_type.txt") or ["classification"]
    if kind[0].lower() not in ("retrieval", "classification"):
        raise InputError(f"{root / 'dataset_type.txt'}: expected retrieval or classification, got {kind[0]!r}")
    sources: list[Source | ImageFolder] = []
    for shard in range(int(number)):
        path = place / f"{shard}.tar"
        if not path.is_file():
            raise InputError(f"{name}: expected a file, got {str(path)!r}, which does not exist")
        sources.append(Source(str(path), name=path.name))
    names, templates = (_lines(root / file) for file in ("classnames.txt", "zeroshot_classification_templates.txt"))
    return HeldOut(sources, Classes(names, templates=templates), captions, txt_lines=True)


def _lines(file: Path) -> list[str] | None:
    if not file.is_file():
        return None
    try:
        return [clean(line) for line in file.read_text("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: expected UTF-8, got {error}") from None
