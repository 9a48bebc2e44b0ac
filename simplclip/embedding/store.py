"""Files of features [N, D] with a row of metadata each: .npz, .parquet, or a folder in clip-retrieval's layout.

Memory does not depend on N, neither in writing nor in reading. A file may come from elsewhere: what it says of itself is
compared with what is in it when it is opened.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from simplclip.common.errors import InputError
from simplclip.common.files import HOUR, remove_leftovers, replacing, temporary_folder
from simplclip.data import arrays
from simplclip.data.text import json_of
from simplclip.evaluation.features import Features

COLUMNS = ("key", "caption", "shard", "image_path")  # clip-retrieval calls two of them so
ABOUT = 1 << 20  # most bytes of what a file says of itself
_ABOUT = {"count": int, "width": int, "name": str, "weights": str, "source": str, "precision": str, "tower": str}
CHUNK = 16384  # rows that are packed or read at a time
_TEXT = 16 << 20  # most bytes that each text of a column may take
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
    remove_leftovers(path.parent, path.name.__eq__, HOUR)
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
        with temporary_folder(self.out) as temporary:
            for name in (f"{tower}_emb", "metadata"):
                (temporary / name).mkdir(parents=True)
            with open(temporary / f"{tower}_emb" / f"{tower}_emb_0.npy", "wb") as file:
                _header(file, self._dtype, (len(self.features), self.features.width))
                for features, _ in self._parts():
                    file.write(features.tobytes())
            with open(temporary / "metadata" / "metadata_0.parquet", "wb") as file:
                self._table(file, about, features=False)
            os.replace(temporary, self.out)

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
        except Exception as error:  # the type depends on the damage
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(f"features: expected a file of simplclip embed, got {str(path)!r}: {reason}") from None

    def _open(self) -> None:
        if self.path.is_dir():
            (file,) = self.path.glob("*_emb/*_emb_0.npy")
            self._mapped = self._of_file(file, 0)
            rows = self.path / "metadata" / "metadata_0.parquet"
        elif self.path.suffix == ".parquet":
            self._mapped, rows = None, self.path
        else:
            rows = None
            with zipfile.ZipFile(self.path) as archive:
                self._mapped = self._of_archive(archive.getinfo("features.npy"))
            self.about = json_of(str(arrays.from_npz(self.path, "about", max_bytes=ABOUT)[0]))
            for column in COLUMNS:
                if arrays.shape_in_npz(self.path, column) != (self._shape[0],):
                    raise ValueError(f"expected {column} of each of {self._shape[0]:,} rows")
        self._parquet = rows and _pyarrow(self.path).parquet.ParquetFile(rows)
        if rows:
            self.about = json_of((self._parquet.schema_arrow.metadata or {})[b"simplclip"])
            found = self._parquet.metadata
            groups = [found.row_group(i).num_rows for i in range(found.num_row_groups)]
            self._group = groups[0]
            if self._group > CHUNK or {*groups[:-1]} - {self._group} or groups[-1] > self._group:
                raise ValueError(f"expected groups of one size, at most {CHUNK:,} rows, got {groups[0]:,}")
            self._shape = self._shape if self._mapped else (found.num_rows, self.about["width"])
        for name, kind in _ABOUT.items():
            if not isinstance(self.about, dict) or not isinstance(self.about.get(name), kind):
                raise ValueError(f"it has no {name} of its model")
        if self._shape != (self.about["count"], self.about["width"]) or (rows and found.num_rows != self._shape[0]):
            raise ValueError(f"expected features of {self.about['count']:,} rows, got {list(self._shape)}")

    def _of_archive(self, member: zipfile.ZipInfo) -> Callable[[], np.ndarray]:
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError("expected features that are not compressed")
        with open(self.path, "rb") as file:
            file.seek(member.header_offset + 26)  # the lengths of name and extra field, before the contents
            name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
        return self._of_file(self.path, member.header_offset + 30 + name + extra)

    def _of_file(self, path: Path, place: int) -> Callable[[], np.ndarray]:
        """What maps the features, whose header lies at `place`, into memory."""
        with open(path, "rb") as file:
            file.seek(place)
            self._shape, fortran, dtype = arrays.header(file)
            if len(self._shape) != 2 or fortran or dtype not in ("<f2", "<f4"):
                raise ValueError(f"expected features [N, D], got {dtype} {list(self._shape)}")
            map_them = functools.partial(np.memmap, path, dtype, "r", file.tell(), self._shape)
        map_them()  # raises ValueError if there are fewer bytes
        return map_them

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
                    _, _, dtype = arrays.header(member)
                    if dtype.kind != "U" or dtype.itemsize > _TEXT:
                        raise InputError(f"features: expected {column} of texts in {self.path}, got {dtype}")
                    place = 0
                    for number in numbers:
                        for skip in range((number - place) * dtype.itemsize, 0, -(1 << 24)):
                            member.read(min(skip, 1 << 24))
                        found[number][column] = str(np.frombuffer(member.read(dtype.itemsize), dtype)[0])
                        place = number + 1
        return found
