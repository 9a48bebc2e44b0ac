"""Parquet files as rows: of paths of images, or of image files that the table holds."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from simplclip.common.errors import InputError
from simplclip.data.rows import (
    IMAGE_NAMES,
    Options,
    PairRow,
    Reader,
    RowSource,
    columns_of,
    file_source,
    merged_by_image,
    table_row,
    texts_of,
)

_BATCH = 4096  # rows that are read at a time
_EMBEDDED_BATCH = 16  # of image files


class ParquetReader(Reader):
    """A table of paths of images, or of image files, and captions."""

    endings = (".parquet",)
    about = "a table of image paths or image files"

    @classmethod
    def read(cls, path: str, options: Options) -> RowSource:
        """Returns the rows of a file; a column of image files comes before one of paths."""
        import pyarrow
        import pyarrow.parquet

        try:
            file = pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise InputError(f"source: expected a parquet file, got {path!r}: {error}") from None
        schema = file.schema_arrow
        with_files = [field.name for field in schema if _holds_files(field.type)]
        given = options
        if options.image_key is None:
            own = next((name for name in IMAGE_NAMES if name in with_files), None)
            given = replace(options, image_key=own)
        columns = columns_of(schema.names, path, given)
        embedded = columns[0] in with_files
        batch_size = _EMBEDDED_BATCH if embedded else _BATCH

        def pairs() -> Iterator[tuple[Any, ...]]:
            """Yields (image, captions) of each row as pyarrow scalars."""
            try:
                for batch in file.iter_batches(batch_size, columns=columns):
                    yield from zip(*(batch.column(name) for name in columns))
            except (pyarrow.ArrowException, OSError) as error:
                raise InputError(
                    f"source: expected a parquet file, got {path!r}, which is damaged: {error}"
                ) from None

        def value(scalar: Any) -> Any:
            """Returns the Python value of a pyarrow scalar, None if it has none, as a far date."""
            try:
                return scalar.as_py()
            except UnicodeDecodeError:
                raise
            except (ValueError, OverflowError, pyarrow.ArrowException):
                return None

        def rows() -> Iterator[PairRow]:
            """Yields a `PairRow` for each row, with `problem` for one whose texts are not UTF-8."""
            for number, (image, captions) in enumerate(pairs()):
                name = f"{os.path.basename(path)}/{number:09d}"
                try:
                    texts = texts_of(value(captions))
                except UnicodeDecodeError:
                    yield PairRow(name, problem=("caption not UTF-8", ""))
                    continue
                try:
                    image_or_path = _image(value(image))
                except UnicodeDecodeError:
                    yield PairRow(
                        name, problem=("missing image", "expected a path, got other bytes")
                    )
                    continue
                yield table_row(name, image_or_path, texts, path, options)

        total = file.metadata.num_rows
        return file_source(path, options, total, lambda: merged_by_image(rows()), embedded=embedded)


def _holds_files(kind: Any) -> bool:
    """Whether a column may hold image files: binary, or a struct as Hugging Face's image."""
    import pyarrow.types

    if pyarrow.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def _image(value: object) -> object:
    """Returns the path, a str, or the file, bytes, that a value of the images' column is."""
    if isinstance(value, dict):
        return value.get("bytes") or value.get("path")
    # no path has NUL, and no image of a format that is read is without and in UTF-8
    if isinstance(value, bytes) and b"\0" not in value:
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode()
    return value
