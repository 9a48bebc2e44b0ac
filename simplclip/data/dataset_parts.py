"""Folders that are parts of a dataset, such as train and val, in the place of classes."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from simplclip.common.errors import InputError

# fmt: off
_WORDS = {
    "train", "training", "trainval", "val", "valid", "validation", "minival", "dev",
    "test", "testing", "eval", "evaluation", "unlabeled", "split", "set", "part", "fold",
    "image", "images", "img", "imgs", "jpegimages", "photo", "photos", "picture", "pictures",
    "annotation", "annotations", "caption", "captions", "label", "labels", "mask", "masks",
    "data", "dataset", "datasets",
}
# fmt: on


def check_classes(path: str, folders: Collection[str]) -> None:
    """Raises InputError if all `folders` with images in `path` are parts of a dataset.

    A part's name consists of _WORDS and numbers, such as val2017 or test_images. One class may have
    such a name, as long as another one has not.
    """
    if not folders or not all(map(_is_part, folders)):
        return
    parts = sorted(folders)
    raise InputError(
        "source: expected a folder of images with captions, or with a folder for each class, got "
        f"{path!r}, whose folders are parts of a dataset: {', '.join(parts[:5])}; "
        f"{_advice(path, parts)}"
    )


def _is_part(name: str) -> bool:
    """Whether a folder's name consists of _WORDS and numbers, with at least one word."""
    words = re.findall(r"[^\W\d_]+", name.lower())
    return bool(words) and _WORDS.issuperset(words)


def _advice(path: str, parts: list[str]) -> str:
    """Returns the end of the error: what to name in place of `path`, whose `parts` have images."""
    found = []
    for part in parts:
        file, folder = Path(path, "annotations", f"captions_{part}.json"), Path(path, part)
        if file.is_file():
            found.append(f"{str(file)!r} with --images {str(folder)!r} (in a config `images`)")
        elif _has_classes(folder):
            found.append(repr(str(folder)))
    if found:
        return f"try {' or '.join(found[:2])}"
    return "captions are texts beside the images: KEY.txt or KEY.json beside KEY.jpg"


def _has_classes(folder: Path) -> bool:
    """Whether a folder has subfolders that are not all parts of a dataset."""
    names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    return not all(map(_is_part, names))
