"""Files of features [N, D] with a row of metadata each: .npz, .parquet, or a folder in clip-retrieval's layout.

Memory does not depend on N, neither in writing nor in reading.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from simplclip.common.errors import InputError
from simplclip.common.files import replacing
from simplclip.data.text import json_of
from simplclip.evaluation.features import Features

COLUMNS = ("key", "caption", "shard", "image_path")  # clip-retrieval calls two of them so
ABOUT = 1 << 20  # most bytes of a file's account of its model, and of a text
_ABOUT = {"count": int, "width": int, "name": str, "weights": str, "source": str, "precision": str, "tower": str}
CHUNK = 16384  # rows that are packed or read at a time
_FORMS = "a name that ends in .npz or .parquet, or a folder"


def check_out(out: str | os.PathLike) -> Path:
    """The path of a file that may be written. Raises InputError."""
    path = Path(out)
    if path.suffix not in ("", ".npz", ".parquet"):
        raise InputError(f"out: expected {_FORMS}, got {str(out)!r}")
    if path.suffix != ".npz":
        _pyarrow(path)
    if not path.suffix and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"out: expected a new or empty folder, got {str(out)!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            f"{path}: expected the package pyarrow for parquet, got none: pip install 'simplclip[embed]', or write .npz"
        ) from None
    return pyarrow


class Writer:
    """Collects features and rows in temporary files beside `out`; `finish` packs them into it, as a whole."""

    def __init__(self, out: Path, half: bool) -> None:
        self.out = out
        self.features = Features(folder=out.parent, half=half)
        self._dtype = np.dtype("<f2" if half else "<f4")
        self._rows = tempfile.TemporaryFile("w+", encoding="ascii", dir=out.parent)  # noqa: SIM115
        self._longest = dict.fromkeys(COLUMNS, 1)

    def append(self, features: Tensor, rows: Sequence[dict[str, str]]) -> None:
        """features: [k, D], rows: k"""
        self.features.append(features)
        for row in rows:
            self._rows.write(json.dumps([row.get(column, "") for column in COLUMNS]) + "\n")
            for column in COLUMNS:
                self._longest[column] = max(self._longest[column], len(row.get(column, "")))

    def finish(self, about: dict[str, Any]) -> Path:
        self.features.finish()
        {".npz": self._npz, ".parquet": self._parquet, "": self._folder}[self.out.suffix](about)
        self._rows.close()
        return self.out

    def _parts(self) -> Iterator[tuple[np.ndarray, list[list[str]]]]:
        self._rows.seek(0)
        for start in range(0, len(self.features), CHUNK):
            rows = [json.loads(line) for line in itertools.islice(self._rows, CHUNK)]
            yield self.features[start : start + CHUNK].numpy().astype(self._dtype), rows

    def _npz(self, about: dict[str, Any]) -> None:
        """Features are not compressed, so that they can be mapped into memory. Strings are, as they are padded."""
        with replacing(self.out) as file, zipfile.ZipFile(file, "w") as archive:
            with archive.open("features.npy", "w", force_zip64=True) as member:
                _header(member, self._dtype, (len(self.features), self.features.width))
                for features, _ in self._parts():
                    member.write(features.tobytes())
            for number, column in enumerate(COLUMNS):
                info = zipfile.ZipInfo(f"{column}.npy")
                info.compress_type = zipfile.ZIP_DEFLATED
                dtype = np.dtype(f"<U{self._longest[column]}")
                with archive.open(info, "w", force_zip64=True) as member:
                    _header(member, dtype, (len(self.features),))
                    for _, rows in self._parts():
                        member.write(np.array([row[number] for row in rows], dtype).tobytes())
            text = io.BytesIO()
            np.save(text, np.array(json.dumps(about, ensure_ascii=False)))
            archive.writestr("about.npy", text.getvalue())

    def _parquet(self, about: dict[str, Any]) -> None:
        with replacing(self.out) as file:
            self._table(file, about, features=True)

    def _folder(self, about: dict[str, Any]) -> None:
        tower = "img" if about["tower"] == "image" else "text"
        temporary = self.out.with_name(f".{self.out.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            for name in (f"{tower}_emb", "metadata"):
                (temporary / name).mkdir(parents=True)
            with open(temporary / f"{tower}_emb" / f"{tower}_emb_0.npy", "wb") as file:
                _header(file, self._dtype, (len(self.features), self.features.width))
                for features, _ in self._parts():
                    file.write(features.tobytes())
            with open(temporary / "metadata" / "metadata_0.parquet", "wb") as file:
                self._table(file, about, features=False)
            os.replace(temporary, self.out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _table(self, file: BinaryIO, about: dict[str, Any], features: bool) -> None:
        arrow, width = _pyarrow(self.out), self.features.width
        fields = [(column, arrow.string()) for column in COLUMNS]
        kind = arrow.from_numpy_dtype(self._dtype)
        schema = arrow.schema([*fields, *([("features", arrow.list_(kind, width))] if features else [])])
        schema = schema.with_metadata({"simplclip": json.dumps(about)})
        with arrow.parquet.ParquetWriter(file, schema) as writer:
            for part, rows in self._parts():
                # Names of files that are not UTF-8 have surrogates, which parquet does not allow.
                columns = [
                    arrow.array([text.encode("utf-8", "backslashreplace").decode() for text in c], arrow.string())
                    for c in zip(*rows)
                ]
                if features:
                    columns.append(arrow.FixedSizeListArray.from_arrays(arrow.array(part.reshape(-1)), width))
                writer.write_table(arrow.Table.from_arrays(columns, schema=schema), row_group_size=CHUNK)


def _header(file: Any, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": shape})


class Stored:
    """A file of features that `embed` wrote: `about` the model, features by slices, and rows of metadata."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"features: no such file: {path}")
        try:
            self._open()
        except (ValueError, LookupError, TypeError, OSError, zipfile.BadZipFile) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"features: expected a file of simplclip embed, got {str(path)!r}: {reason}") from None

    def _open(self) -> None:
        if self.path.is_dir():
            (file,) = self.path.glob("*_emb/*_emb_0.npy")
            self._mapped = functools.partial(np.load, file, mmap_mode="r")
            rows = self.path / "metadata" / "metadata_0.parquet"
        elif self.path.suffix == ".parquet":
            self._mapped, rows = None, self.path
        else:
            rows = None
            with zipfile.ZipFile(self.path) as archive:
                if archive.getinfo("about.npy").file_size > ABOUT:
                    raise ValueError(f"about.npy of more than {ABOUT:,} bytes")
                about = np.lib.format.read_array(io.BytesIO(archive.read("about.npy")), allow_pickle=False)
                self.about = json_of(str(about))
                self._mapped = self._of_archive(archive.getinfo("features.npy"))
        self._parquet = rows and _pyarrow(self.path).parquet.ParquetFile(rows)
        if rows:
            self.about = json_of((self._parquet.schema_arrow.metadata or {})[b"simplclip"])
            self._group = self._parquet.metadata.row_group(0).num_rows
        for name, kind in _ABOUT.items():
            if not isinstance(self.about, dict) or not isinstance(self.about.get(name), kind):
                raise ValueError(f"it has no {name} of its model")
        if self._mapped and list(self._mapped().shape) != [self.about["count"], self.about["width"]]:
            raise ValueError(f"features of {list(self._mapped().shape)}, expected {self.about['count']} rows")

    def _of_archive(self, member: zipfile.ZipInfo) -> Callable[[], np.ndarray]:
        with open(self.path, "rb") as file:
            file.seek(member.header_offset + 26)  # the lengths of name and extra field, before the contents
            name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
            file.seek(name + extra, os.SEEK_CUR)
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            if dtype.str not in ("<f2", "<f4") or member.compress_type:
                raise ValueError(f"features of {dtype.str}, expected uncompressed ones of 16 or 32 bits")
            return functools.partial(np.memmap, self.path, dtype, "r", file.tell(), shape)

    def __len__(self) -> int:
        return self.about["count"]

    def __getitem__(self, rows: slice) -> Tensor:
        """float32 [k, D]: a copy."""
        start, stop, _ = rows.indices(len(self))
        if self._mapped:  # each time anew, so that pages do not stay in memory
            return torch.from_numpy(self._mapped()[start:stop].astype(np.float32))
        first, last = start // self._group, max(start, stop - 1) // self._group
        column = self._parquet.read_row_groups([*range(first, last + 1)], ["features"])["features"].combine_chunks()
        flat = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, self.about["width"])
        return torch.from_numpy(flat[start - first * self._group : stop - first * self._group].astype(np.float32))

    def rows(self, numbers: Sequence[int]) -> dict[int, dict[str, str]]:
        """The metadata of these rows."""
        numbers = sorted(set(numbers))
        if self._parquet is None:
            return self._of_npz(numbers)
        found: dict[int, dict[str, str]] = {}
        for group, members in itertools.groupby(numbers, lambda number: number // self._group):
            several = [*members]
            table = self._parquet.read_row_group(group, [*COLUMNS]).take([number % self._group for number in several])
            found |= zip(several, table.to_pylist())
        return found

    def _of_npz(self, numbers: list[int]) -> dict[int, dict[str, str]]:
        found: dict[int, dict[str, str]] = {number: {} for number in numbers}
        with zipfile.ZipFile(self.path) as archive:
            for column in COLUMNS:
                with archive.open(f"{column}.npy") as member:
                    np.lib.format.read_magic(member)
                    _, _, dtype = np.lib.format.read_array_header_1_0(member)
                    if dtype.kind != "U" or dtype.itemsize > ABOUT:
                        raise InputError(f"features: expected text in {column} of {str(self.path)!r}, got {dtype.str}")
                    place = 0
                    for number in numbers:
                        for skip in range((number - place) * dtype.itemsize, 0, -(1 << 24)):
                            member.read(min(skip, 1 << 24))
                        found[number][column] = str(np.frombuffer(member.read(dtype.itemsize), dtype)[0])
                        place = number + 1
        return found
