"""Images with captions in a JSON file: Karpathy's, COCO's, or a list of objects; UTF-8, with or without byte order mark."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simplclip.common.errors import InputError
from simplclip.data.broken import Skipped
from simplclip.data.parts import ROWS, Part, checked, image_sample
from simplclip.data.shards import Sample
from simplclip.data.tables import CAPTION_NAMES, IMAGE_NAMES, Options, name_in
from simplclip.data.text import json_of

SUFFIX = ".json"


@dataclass(frozen=True, kw_only=True)
class Annotated(Part):
    """Images of a JSON file with their captions; the key of a sample is its image's path in the file."""

    images: str  # folder of the images
    entries: list[tuple[str, list[Any]]]

    def read(self, skipped: Skipped, **options: Any) -> Iterator[Sample]:
        for path, captions in self.entries:
            yield from image_sample(self.url, path, self.images, path, captions, skipped)


def annotated(path: str, options: Options, name: str) -> list[Part]:
    """Returns the pieces of a JSON file. Several entries of one image are one sample with all captions. Raises InputError."""
    found: dict[str, list[Any]] = {}
    for image, captions in _entries(path, options, name):
        found.setdefault(image, []).extend(captions)
    if not found:
        of_split = f" of the split {options.split!r}" if options.split else ""
        raise InputError(f"{name}: expected images with captions, got none{of_split} in {path!r}")
    entries = list(found.items())
    pieces = [entries[start : start + ROWS] for start in range(0, len(entries), ROWS)]
    folder = options.folder(path)
    return checked([Annotated(url=path, count=len(some), images=folder, entries=some) for some in pieces], name)


def _entries(path: str, options: Options, name: str) -> Iterator[tuple[str, list[Any]]]:
    try:
        found = json_of(Path(path).read_text("utf-8-sig"))
        entries = found["images"] if isinstance(found, dict) else found
        if isinstance(found, dict) and "annotations" in found:  # COCO's captions_val2017.json
            paths = {entry["id"]: _value(entry, options.image_key, IMAGE_NAMES) for entry in entries}
            yield from ((str(paths[entry["image_id"]]), [entry["caption"]]) for entry in found["annotations"])
            return
        splits = list(dict.fromkeys(entry["split"] for entry in entries if "split" in entry))
        if options.split is None and len(splits) > 1:
            raise InputError(
                f"{name}: expected one of the splits {', '.join(map(str, splits))}, as {path}#{splits[0]}, got none"
            )
        for entry in entries:
            if options.split is None or entry.get("split", options.split) == options.split:
                yield _image(entry, options), _captions(entry, options)
    except InputError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{name}: expected images with captions, as in Karpathy's or COCO's JSON, got {path!r}, another one: "
            f"{type(error).__name__}: {error}"
        ) from None


def _image(entry: dict[str, Any], options: Options) -> str:
    if options.image_key is None and "filepath" in entry and "filename" in entry:  # Karpathy's: a folder and a name
        return os.path.join(entry["filepath"], entry["filename"])
    path = _value(entry, options.image_key, IMAGE_NAMES)
    if not isinstance(path, str):
        raise TypeError(f"expected a path, got {str(path)[:40]!r}")
    return path


def _captions(entry: dict[str, Any], options: Options) -> list[Any]:
    texts = _value(entry, options.caption_key, CAPTION_NAMES)
    texts = texts if isinstance(texts, list) else [texts]
    return [text["raw"] if isinstance(text, dict) else text for text in texts]


def _value(entry: dict[str, Any], wanted: str | None, known: tuple[str, ...]) -> Any:
    """Returns the value of `wanted`, or else of the first known name that `entry` has. Raises LookupError without one."""
    name = name_in(entry, wanted, known)
    if name is None:
        raise LookupError(f"none of {wanted or ', '.join(known)}")
    return entry[name]
