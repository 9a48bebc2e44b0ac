"""Folders: of images with their texts beside them, of images by class, and data sets in clip-benchmark's layout."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simplclip.common.errors import InputError
from simplclip.data.broken import Skipped
from simplclip.data.parts import ROWS, Classes, Part, Tar, span_of, split_name
from simplclip.data.shards import IMAGE_SUFFIXES, Sample
from simplclip.data.text import clean

IMAGES = tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)


@dataclass(frozen=True, kw_only=True)
class Files(Part):
    """Files of a folder. The files of one key form a sample.

    alone: each image is a sample by itself, whose key is its path. In the folder of a class its label is this class.
    """

    names: bytes  # paths of the files, one sample after another, each path ended by a zero byte
    alone: bool = False

    def read(self, skipped: Skipped, **options: Any) -> Iterator[Sample]:
        numbers = {name: number for number, name in enumerate(self.classes.folders)} if self.classes else {}
        paths = map(os.fsdecode, self.names[:-1].split(b"\0"))
        several = itertools.groupby(paths, lambda path: split_name(path)[0])
        for key, files in ((path, [path]) for path in paths) if self.alone else several:
            sample: Sample = {"__key__": key, "__url__": self.url}
            for path in files:
                if span := span_of(os.path.join(self.url, path)):
                    sample[split_name(path)[1]] = span
            if numbers and os.sep in key:
                sample["__label__"] = numbers[key.split(os.sep)[0]]
            yield sample


def folder(path: str, name: str) -> list[Part]:
    """Returns the pieces of a folder of images and of its subfolders, in the order of names. Raises InputError.

    If no image has a text beside it (KEY.txt or KEY.json beside KEY.jpg), the subfolders are classes, as in torchvision's
    ImageFolder.
    """
    pieces: list[bytes] = []
    texts, last = False, 0
    samples = _samples(path)
    while some := list(itertools.islice(samples, ROWS)):
        texts = texts or any(not file.lower().endswith(IMAGES) for files in some for file in files)
        last = len(some)
        pieces.append(_encoded(file for files in some for file in files))
    if not pieces:
        hint = " (try its *.tar)" if any(file.endswith(".tar") for file in os.listdir(path)) else ""
        raise InputError(
            f"{name}: expected a folder of images, or of clip-benchmark's layout (test/nshards.txt), got {path!r}, which has "
            f"no image{hint}"
        )
    if texts:
        counts = [ROWS] * (len(pieces) - 1) + [last]
        return [Files(url=path, count=count, names=names) for count, names in zip(counts, pieces)]
    folders = tuple(sorted(entry.name for entry in os.scandir(path) if entry.is_dir()))
    classes = Classes([clean(one.replace("_", " ")) for one in folders], folders) if folders else None
    return [_images(path, names, classes) for names in pieces]


def images(paths: list[str]) -> list[Part]:
    """Returns the pieces of a list of image files, which have no captions."""
    folder = os.path.dirname(paths[0]) or "."
    pieces = (paths[start : start + ROWS] for start in range(0, len(paths), ROWS))
    return [_images(folder, _encoded(map(os.path.abspath, some)), None) for some in pieces]


def _images(url: str, names: bytes, classes: Classes | None) -> Part:
    return Files(url=url, count=names.count(b"\0"), names=names, classes=classes, alone=True)


def _encoded(files: Iterable[str]) -> bytes:
    return b"".join(os.fsencode(file) + b"\0" for file in files)


def _samples(path: str) -> Iterator[list[str]]:
    """Yields the files of each sample that has an image, relative to `path`. Subfolders of a linked folder are left out."""
    for place, folders, files in os.walk(path, followlinks=True):
        folders.sort()
        if place != path and os.path.islink(place):  # a link may lead anywhere, also to a folder that contains it
            folders.clear()
        inside = "" if place == path else os.path.relpath(place, path) + os.sep
        samples: dict[str, list[str]] = {}
        for file in files:
            if key := split_name(file):
                samples.setdefault(key[0], []).append(inside + file)
        for _, several in sorted(samples.items()):
            if any(split_name(file)[1] in IMAGE_SUFFIXES for file in several):
                yield sorted(several)


def clip_benchmark(path: str, split: str | None, name: str) -> list[Part] | None:
    """Returns the tars of FOLDER/SPLIT in clip-benchmark's layout, or of FOLDER if it is a split itself; None for others.

    split: None to take the only split. Raises InputError.
    """
    splits = [split] if split else sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    places = [place for place in (*(Path(path, one) for one in splits), Path(path)) if (place / "nshards.txt").is_file()]
    if not places:
        return None
    if len(places) > 1 and not split:
        several = ", ".join(place.name for place in places)
        raise InputError(f"{name}: expected one of the splits {several}, as {path}#{places[0].name}, got none")
    place = places[0]
    root = place.parent if place == Path(path) else Path(path)
    number = (place / "nshards.txt").read_text(errors="replace").strip()
    if not number.isdecimal() or len(number) > 9 or not int(number):
        raise InputError(f"{place / 'nshards.txt'}: expected the number of shards, got {number[:40]!r}")
    kind = _lines(root / "dataset_type.txt") or ["classification"]
    if kind[0].lower() not in ("retrieval", "classification"):
        raise InputError(f"{root / 'dataset_type.txt'}: expected retrieval or classification, got {kind[0]!r}")
    names, templates = (_lines(root / file) for file in ("classnames.txt", "zeroshot_classification_templates.txt"))
    tars = []
    for shard in range(int(number)):
        tars.append(os.fspath(place / f"{shard}.tar"))
        if not os.path.exists(tars[-1]):
            raise InputError(f"{name}: expected a file, got {tars[-1]!r}, which does not exist")
    classes = Classes(names, templates=templates) if names or templates else None
    return [Tar(url=tar, classes=classes) for tar in tars]


def _lines(file: Path) -> list[str] | None:
    if not file.is_file():
        return None
    try:
        return [clean(line) for line in file.read_text("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: expected UTF-8, got {error}") from None
