"""Folders of images: with KEY.txt or KEY.json beside KEY.jpg, or with a folder for each class (torchvision's ImageFolder)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator

from simplclip.common.errors import InputError
from simplclip.data.forms import Row, Rows, Source
from simplclip.data.text import IMAGE_SUFFIXES

_SUFFIXES = tuple(f".{suffix}" for suffix in (*IMAGE_SUFFIXES, "txt", "json"))


def source(path: str) -> Source:
    """Returns the images of a folder and of its subfolders, in the order of names. Raises InputError if there is none.

    If no image has a text beside it, the folders in `path` are classes: the label of an image, and its caption.
    """
    path = path.rstrip(os.sep) or path
    digest = hashlib.blake2b(digest_size=16)
    images, texts = 0, False
    for sample in _samples(path):
        images += 1
        texts = texts or len(sample) > 1
        digest.update(repr(sorted(sample.items())).encode("utf-8", "surrogateescape"))
    if not images:
        hint = " (try its *.tar)" if any(file.endswith(".tar") for file in os.listdir(path)) else ""
        raise InputError(f"source: expected a folder of images with captions, got {path!r}, which has no image{hint}")

    def rows() -> Rows:
        for sample in _samples(path):
            suffix, file = next((suffix, sample[suffix]) for suffix in IMAGE_SUFFIXES if suffix in sample)
            key, image = file[: -len(suffix) - 1], os.path.join(path, file)
            name = f"{os.path.basename(path)}/{key}"
            if texts:
                files = [(suffix, sample[suffix]) for suffix in ("txt", "json") if suffix in sample]
                beside: dict[str, str] = {suffix: os.path.join(path, file) for suffix, file in files}
                yield Row(name, image, texts=beside)
            else:
                label = key.split(os.sep)[0].replace("_", " ") if os.sep in key else None
                yield Row(name, image, [label] if label else [], label=label)

    state = {"images": images, "names": digest.hexdigest()}
    return Source(path, images, state, rows)


def _samples(path: str) -> Iterator[dict[str, str]]:
    """Yields the files of each image, suffix -> path relative to `path`. Subfolders of a linked folder are left out."""
    for place, folders, files in os.walk(path, followlinks=True):
        folders.sort()
        if place != path and os.path.islink(place):  # a link may lead anywhere, also to a folder that contains it
            folders.clear()
        inside = "" if place == path else os.path.relpath(place, path) + os.sep
        samples: dict[str, dict[str, str]] = {}
        for file in sorted(files):
            suffix = next((suffix for suffix in _SUFFIXES if file.lower().endswith(suffix)), None)
            if suffix:
                samples.setdefault(file[: -len(suffix)], {}).setdefault(suffix[1:], inside + file)
        for _, sample in sorted(samples.items()):
            if not sample.keys().isdisjoint(IMAGE_SUFFIXES):
                yield sample
