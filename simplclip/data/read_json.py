"""JSON files as rows: in Karpathy's or COCO's format, or with an object on each line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from simplclip.common.errors import InputError
from simplclip.data.rows import (
    LINE_BYTES,
    Options,
    PairRow,
    Reader,
    RowSource,
    columns_of,
    file_source,
    line_count,
    merged_by_image,
    table_row,
    texts_of,
)

_EXPECTED = "images with captions, as in Karpathy's or COCO's JSON"


class JsonLinesReader(Reader):
    """A table with a JSON object on each line, whose names are columns."""

    endings = (".jsonl",)
    about = "an object on each line"
    metadata = "metadata.jsonl"

    @classmethod
    def read(cls, path: str, options: Options) -> RowSource:
        """Returns the rows of a file, whose first object says which columns there are."""
        with open(path, "rb") as file:
            first = next(_objects(file), None)
            if not isinstance(first, dict):
                got = f"{path!r}: {first}" if first else f"{path!r}, which has no line"
                raise InputError(f"source: expected a JSON object on each line, got {got}")
            file.seek(0)
            total = line_count(file)
        image, caption = columns_of([*first], path, options)

        def rows() -> Iterator[PairRow]:
            """Yields a row for each line, with `problem` for a bad one."""
            with open(path, "rb") as file:
                for number, record in enumerate(_objects(file)):
                    name = f"{os.path.basename(path)}/{number:09d}"
                    if isinstance(record, str):
                        yield PairRow(name, problem=("bad row", record))
                    else:
                        texts = texts_of(record.get(caption))
                        yield table_row(name, record.get(image), texts, path, options)

        return file_source(path, options, max(1, total), lambda: merged_by_image(rows()))


def _objects(file: BinaryIO) -> Iterator[dict[str, Any] | str]:
    """Yields the JSON object of each line that is not empty, or a str that says what is wrong."""
    from simplclip.data.samples import json_of

    while line := file.readline(LINE_BYTES):
        if not line.strip():
            continue
        try:
            record = json_of(line)
        except ValueError as error:
            yield str(error)
            continue
        yield record if isinstance(record, dict) else f"a {type(record).__name__}"


class JsonReader(Reader):
    """A JSON file in Karpathy's or COCO's format."""

    endings = (".json",)
    about = "a JSON file of Karpathy's or COCO's kind, FILE.json#SPLIT"
    options = ("images", "split")

    @classmethod
    def read(cls, path: str, options: Options) -> RowSource:
        """Returns a row for each image, with all its captions; the file is parsed now."""
        captions: dict[str, list[object]] = {}
        try:
            for image, texts in _entries(_parsed(path), path, options):
                captions.setdefault(image, []).extend(texts)
        except KeyError as error:
            got = f"{path!r} with an entry without {error}"
            raise InputError(f"source: expected {_EXPECTED}, got {got}") from None
        except (TypeError, AttributeError) as error:
            got = f"{path!r} with an entry of another form: {error}"
            raise InputError(f"source: expected {_EXPECTED}, got {got}") from None
        if not captions:
            split = f" of the split {options.split!r}" if options.split else ""
            raise InputError(f"source: expected images with captions, got none{split} in {path!r}")
        name = os.path.basename(path)
        rows = [
            PairRow(f"{name}/{image}", options.image(path, image), texts)
            for image, texts in captions.items()
        ]
        return file_source(path, options, len(rows), lambda: iter(rows))


def _parsed(path: str) -> dict[str, Any]:
    """Returns the content of a JSON file, an object with images. Raises InputError for another."""
    from simplclip.data.samples import json_of

    try:
        content = json_of(Path(path).read_text("utf-8-sig"))
    except ValueError as error:
        raise InputError(f"source: expected {_EXPECTED}, got {path!r}: {error}") from None
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        return content
    got = f"{path!r}, which is a {type(content).__name__}"
    if isinstance(content, dict):
        got = f"{path!r} without a list of images, with {', '.join(map(repr, content))[:300]}"
    if isinstance(content, list):
        got += f"; an object on each line makes a table: jq -c '.[]' {path} > {path}l"
    raise InputError(f"source: expected {_EXPECTED}, got {got}")


def _entries(
    content: dict[str, Any], path: str, options: Options
) -> Iterator[tuple[str, list[object]]]:
    """Yields (path or file name of an image, captions); an image may come again."""
    images = content["images"]
    if "annotations" in content:  # COCO's captions_val2017.json
        files = {image["id"]: image["file_name"] for image in images}
        annotations = content["annotations"]
        if annotations and not any("caption" in entry for entry in annotations):
            raise InputError(
                f"source: expected COCO's captions, such as captions_val2017.json, got {path!r}, "
                "whose annotations have none"
            )
        for entry in annotations:
            number = entry["image_id"]
            yield str(files.get(number, f"image_id {number}")), [entry["caption"]]
        return
    splits = list(dict.fromkeys(image["split"] for image in images if "split" in image))
    if options.split is None and len(splits) > 1:
        several = ", ".join(map(str, splits))
        raise InputError(
            f"source: expected one of the splits {several}, as {path}#{splits[0]}, got none"
        )
    for image in images:
        if options.split is None or image.get("split", options.split) == options.split:
            captions = [text["raw"] for text in image.get("sentences", [])]
            yield os.path.join(image.get("filepath", ""), image["filename"]), captions
