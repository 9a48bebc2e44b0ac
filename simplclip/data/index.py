"""Index files: what lies where in a shard, and what is known of its samples, so that nobody has to read the shard for it.

`simplclip data index` writes NAME.tar.index.npz beside NAME.tar, or into another folder, which the environment variable
SIMPLCLIP_INDEX then names to readers. numpy reads it (allow_pickle=False):

    about                   UTF-8 bytes of a JSON object: "format", "shard" (its bytes, mtime_ns, fingerprint), "samples",
                            "torn" (why the tar ends early, or null), "formats" and "reasons" (what the numbers below stand
                            for), "skipped" (reason -> [how many, the first]), "decoded" (whether images were), "tokens"
    names, offset, size     of each file in the tar: names UTF-8 bytes, NUL between two; int64 [files]. None if compressed.
    keys                    of each sample: UTF-8 bytes, NUL between two
    width, height, format, bytes, broken, captions
                            of each sample: int32 and int64 [samples]; the image's, 0 if it is not known; broken is 0, or
                            1 + a place in "reasons"; captions is their number
    characters, tokens      of each caption, those of one sample after another: int32 [captions]; tokens (of CLIP, start and
                            end included) only if asked for

An index names no file but its own, by lying beside it: what it holds are places in that shard.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simplclip.common.files import write_atomically
from simplclip.data.tar import Span

FORMAT = "simplclip-index-1"
SUFFIX = ".index.npz"
FOLDER = "SIMPLCLIP_INDEX"  # environment variable: where indices lie that could not be written beside their shards
SAMPLE = ("width", "height", "format", "bytes", "broken", "captions")  # arrays with a row for each sample


@dataclass
class Index:
    """The index of one shard; `arrays` are read when they are needed."""

    shard: str
    path: Path
    about: dict[str, Any]

    @property
    def samples(self) -> int:
        return self.about["samples"]

    def arrays(self, *names: str) -> list[np.ndarray]:
        with np.load(self.path, allow_pickle=False) as file:
            return [file[name] for name in names]

    def keys(self) -> list[str]:
        return split(self.arrays("keys")[0])

    def members(self) -> Iterator[tuple[str, Span]]:
        """As `tar.members`, which raises at a damaged part; here `about["torn"]` says whether there is one."""
        names, offset, size = self.arrays("names", "offset", "size")
        names = split(names)
        inside = len(names) == len(offset) == len(size) and offset.dtype == size.dtype == np.int64
        if not inside or ((offset < 0) | (size < 0) | (offset + size > self.about["shard"]["bytes"])).any():
            raise ValueError("it names places outside of the shard")
        # One at a time: Python's garbage collector takes long over many tuples.
        shard, make = self.shard, tuple.__new__
        return ((name, make(Span, (shard, *place))) for name, *place in zip(names, offset.tolist(), size.tolist()))


def paths(shard: str) -> list[Path]:
    """Where the index of a shard may lie."""
    name, other = f"{shard}{SUFFIX}", os.environ.get(FOLDER)
    return [Path(name), *([Path(other, os.path.basename(name))] if other else [])]


def load(shard: str) -> Index | None:
    """The index that fits the shard as it is now; None if there is none. One that does not fit is named in a warning."""
    for path in paths(shard):
        if path.is_file():
            try:
                return opened(shard, path)
            except Exception as error:  # a damaged file raises many types
                _warn(path, error)
    return None


def opened(shard: str, path: Path) -> Index:
    """Raises ValueError or other errors if the file is not an index of the shard as it is now."""
    index = Index(shard, path, {})
    index.about = json.loads(index.arrays("about")[0].tobytes())
    if index.about["format"] != FORMAT:
        raise ValueError(f"expected {FORMAT}, got {index.about['format']!r}")
    there, known = os.stat(shard), index.about["shard"]
    if there.st_size != known["bytes"]:
        raise ValueError(f"it was made for a shard of {known['bytes']} bytes, which has {there.st_size} now")
    if there.st_mtime_ns != known["mtime_ns"] and fingerprint(shard) != known["fingerprint"]:  # a copy may have a new time
        raise ValueError("the shard has changed since")
    return index


def members(shard: str) -> tuple[Iterator[tuple[str, Span]], str | None] | None:
    """The files of a shard by an index that fits, and why the tar ends early, if it does; None without such an index."""
    if index := load(shard):
        try:
            return index.members(), index.about["torn"]
        except Exception as error:
            _warn(index.path, error)
    return None


def count(shard: str) -> int | None:
    """The number of samples of a shard by an index that fits."""
    index = load(shard)
    return index.samples if index else None


def fingerprint(path: str | os.PathLike) -> str:
    """A hash of 64 pieces of a file, from its start to its end."""
    digest, piece = hashlib.blake2b(digest_size=16), 4096
    with open(path, "rb", buffering=0) as file:
        last = max(0, os.fstat(file.fileno()).st_size - piece)
        for place in sorted({last * i // 63 for i in range(64)}):
            digest.update(os.pread(file.fileno(), piece, place))
    return digest.hexdigest()


def identity(shard: str) -> dict[str, Any]:
    """What an index knows its shard by."""
    status = os.stat(shard)
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "fingerprint": fingerprint(shard)}


def write(path: Path, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    file = io.BytesIO()
    text = json.dumps({"format": FORMAT} | about).encode()
    np.savez_compressed(file, about=np.frombuffer(text, np.uint8), **arrays)
    write_atomically(path, file.getvalue())


def joined(names: list[str]) -> np.ndarray:
    return np.frombuffer("\0".join(names).encode("utf-8", "surrogateescape"), np.uint8)


def split(names: np.ndarray) -> list[str]:
    return names.tobytes().decode("utf-8", "surrogateescape").split("\0") if len(names) else []


def _warn(path: Path, error: Exception) -> None:
    reason = str(error) or type(error).__name__
    warnings.warn(f"{path} is not used: {reason}; make it anew by `simplclip data index`", stacklevel=2)
