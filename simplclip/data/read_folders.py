"""A folder of images as rows: with texts beside them, or with a folder for each class."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from simplclip.common.errors import InputError
from simplclip.data.dataset_parts import check_classes
from simplclip.data.decode_images import CONVERT, IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES
from simplclip.data.errors import BrokenSample
from simplclip.data.rows import PairRow, RowSource
from simplclip.data.samples import TEXT_BYTES, clean, file_bytes


def open_folder(path: str) -> RowSource:
    """Returns the rows of a folder: its images and those of its subfolders, in order of names.

    A row has the texts (.txt, .json) beside its image. If no image has one, the folders in `path`
    are classes: the label of an image, and its caption. An image of a format that is not read is a
    row with `problem`, unless it was converted beside. Raises InputError if there is no image, if
    the folders are no classes but parts of a dataset, or if a folder cannot be read.
    """
    path = path.rstrip(os.sep) or path
    counts, folders = Counter[bool](), set[str]()
    for image, texts in _images(path):
        counts[bool(texts)] += 1
        folders.add(os.path.dirname(image).partition(os.sep)[0])
    images, any_text = counts.total(), counts[True] > 0
    if not images:
        any_tar = any(file.endswith(".tar") for file in os.listdir(path))
        hint = " (try its *.tar)" if any_tar else ""
        raise InputError(
            f"source: expected a folder of images with captions, got {path!r}, which has no "
            f"image{hint}"
        )
    if not any_text:
        check_classes(path, folders - {""})

    def state() -> dict[str, Any]:
        return {"images": counts[any_text], "names": _digest(path, any_text)}

    def rows() -> Iterator[PairRow]:
        """Yields a row for each image: with its texts, or with its folder as label and caption."""
        for image, texts in _images(path):
            name = os.path.join(os.path.basename(path), os.path.splitext(image)[0])
            file = os.path.join(path, image)
            text_files = {suffix: os.path.join(path, text) for suffix, text in texts.items()}
            folder = image.partition(os.sep)[0]
            other = _suffix(image)
            if other in OTHER_IMAGE_SUFFIXES:
                yield PairRow(name, problem=(f"{other} image", f"not read; {CONVERT}"))
            elif any_text or folder == image:
                yield PairRow(name, file, texts=text_files)
            else:
                label = label_of_folder(folder)
                yield PairRow(name, file, [label] if label else [], text_files, label)

    classes: tuple[str, ...] = ()
    if not any_text:
        classes = tuple(sorted(entry.name for entry in os.scandir(path) if entry.is_dir()))
    return RowSource(path, images, state, rows, classes)


def label_of_folder(name: str) -> str:
    """Returns the label of a class by its folder's name: _ becomes a space, then as by `clean`."""
    return clean(name.replace("_", " "))


def _digest(path: str, any_text: bool) -> str:
    """Returns a digest of file names and texts; `any_text` leaves out images without one."""
    digest = hashlib.blake2b(digest_size=16)
    for image, texts in _images(path):
        # without a text it is no sample: a run's own curves.png may lie in the folder
        if any_text and not texts:
            continue
        digest.update(repr((image, texts)).encode("utf-8", "surrogateescape"))
        for text in texts.values():
            # such a text is counted when its row is read
            with contextlib.suppress(OSError, BrokenSample):
                digest.update(file_bytes(os.path.join(path, text), TEXT_BYTES))
    return digest.hexdigest()


def _refuse(error: OSError) -> None:
    """Raises InputError for a folder that cannot be read; `os.walk` would pass over it."""
    raise InputError(
        f"source: expected folders that can be read, got {error.filename!r}: {error.strerror}"
    ) from error


def _suffix(file: str) -> str:
    return os.path.splitext(file)[1][1:].lower()


def _images(path: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields (image, {"txt" or "json": text beside it}) in order of names, relative to `path`."""
    for folder, subfolders, files in os.walk(path, onerror=_refuse, followlinks=True):
        subfolders.sort()
        inside = ""
        if folder != path:
            inside = os.path.relpath(folder, path)
            if os.path.islink(folder):  # it may lead anywhere, also to a folder that contains it
                subfolders.clear()
        samples: defaultdict[str, dict[str, str]] = defaultdict(dict)  # of each key: file -> suffix
        for file in sorted(files):
            samples[os.path.splitext(file)[0]][os.path.join(inside, file)] = _suffix(file)
        for _, sample in sorted(samples.items()):
            texts = {suffix: file for file, suffix in sample.items() if suffix in ("txt", "json")}
            images = [file for file, suffix in sample.items() if suffix in IMAGE_SUFFIXES]
            others = [file for file, suffix in sample.items() if suffix in OTHER_IMAGE_SUFFIXES]
            for file in images or others:
                yield file, texts
