"""Images with captions in a JSON file: Karpathy's, COCO's, or a list of objects; UTF-8, with or without byte order mark."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simplclip.common.errors import InputError
from simplclip.data.forms import CAPTION_NAMES, IMAGE_NAMES, Options, Row, Source, file_state, key_in
from simplclip.data.text import json_of


def source(path: str, options: Options) -> Source:
    """Returns the images of a JSON file. Several entries of one image are one sample with all captions. Raises InputError."""
    captions: dict[str, list[Any]] = {}
    for image, texts in _entries(path, options):
        captions.setdefault(image, []).extend(texts)
    if not captions:
        of_split = f" of the split {options.split!r}" if options.split else ""
        raise InputError(f"source: expected images with captions, got none{of_split} in {path!r}")
    name = os.path.basename(path)
    rows = [Row(f"{name}/{image}", options.image(path, image), texts) for image, texts in captions.items()]
    return Source(path, len(rows), file_state(path, options), lambda: iter(rows))


def _entries(path: str, options: Options) -> Iterator[tuple[str, list[Any]]]:
    try:
        content = json_of(Path(path).read_text("utf-8-sig"))
        entries = content["images"] if isinstance(content, dict) else content
        if isinstance(content, dict) and "annotations" in content:  # COCO's captions_val2017.json
            paths = {entry["id"]: _value(entry, options.image_key, IMAGE_NAMES) for entry in entries}
            yield from ((str(paths[entry["image_id"]]), [entry["caption"]]) for entry in content["annotations"])
            return
        splits = list(dict.fromkeys(entry["split"] for entry in entries if "split" in entry))
        if options.split is None and len(splits) > 1:
            raise InputError(
                f"source: expected one of the splits {', '.join(map(str, splits))}, as {path}#{splits[0]}, got none"
            )
        for entry in entries:
            if options.split is None or entry.get("split", options.split) == options.split:
                yield _image(entry, options), _captions(entry, options)
    except InputError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"source: expected images with captions, as in Karpathy's or COCO's JSON, got {path!r}, another one: "
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


def _value(entry: dict[str, Any], wanted: str | None, usual: tuple[str, ...]) -> Any:
    """Returns the value of `wanted`, or else of the first usual name that `entry` has. Raises LookupError without one."""
    name = key_in(entry, wanted, usual)
    if name is None:
        raise LookupError(f"none of {wanted or ', '.join(usual)}")
    return entry[name]
