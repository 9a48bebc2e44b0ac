"""Index files: the places of the files in a shard, and facts about its samples, so that readers need not scan the shard.

`simplclip data index` writes NAME.tar.index.npz beside NAME.tar, or into another folder, which the environment variable
SIMPLCLIP_INDEX then names to readers. numpy reads it (allow_pickle=False):

    about                   UTF-8 bytes of a JSON object: "format", "shard" (its bytes, mtime_ns, fingerprint), "samples",
                            "torn" (why the tar ends early, or null), "formats" and "reasons" (what the numbers below stand
                            for), "skipped" (reason -> [how many, the first]), "decoded" (whether images were)
    names, offset, size     of each file in the tar: names UTF-8 bytes, NUL between two; int64 [files], size -1 of a sparse
                            file. Empty for a compressed tar.
    keys                    of each sample: UTF-8 bytes, NUL between two
    width, height, format, bytes, broken, captions
                            of each sample: int32 [samples], bytes int64; those of the image, 0 if not known; broken is 0 or
                            1 + a place in "reasons"; captions is the number of captions
    characters              of each caption, those of one sample after another: int32 [captions]

An index holds places in the shard that it belongs to, and names no other file. It may come from anywhere, so all that is
read is checked: a warning names an index that cannot be right, and the index is not used.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Any, TypeVar

import numpy as np

from simplclip.common.files import write_atomically
from simplclip.data.arrays import from_npz, header_in_npz
from simplclip.data.tar import HOLES, Span

FORMAT = "simplclip-index-1"
SUFFIX = ".index.npz"
FOLDER = "SIMPLCLIP_INDEX"  # environment variable: where indices lie that could not be written beside their shards
SAMPLE = ("width", "height", "format", "bytes", "broken", "captions")  # arrays with a row for each sample
_DTYPES = {"about": "u1", "names": "u1", "keys": "u1", "offset": "i8", "size": "i8", "bytes": "i8"}  # the others are "i4"
_ABOUT, _ARRAY = 1 << 20, 64 << 20  # most bytes of the JSON object, and of an array

Result = TypeVar("Result")


@dataclass
class Index:
    """The index of one shard. Its arrays are read when they are needed; a damaged file raises ValueError or other errors."""

    shard: str
    path: Path
    about: dict[str, Any]

    @property
    def samples(self) -> int:
        return self.about["samples"]

    def arrays(self, *names: str) -> list[np.ndarray]:
        found = from_npz(self.path, *names, max_bytes=_ARRAY)
        for name, array in zip(names, found):
            least, most = HOLES if name == "size" else 0, len(self.about["formats"]) - 1 if name == "format" else None
            if array.dtype != _DTYPES.get(name, "i4") or array.ndim != 1 or (name in SAMPLE and len(array) != self.samples):
                raise ValueError(f"{name}: expected a row of whole numbers, got {array.dtype} {list(array.shape)}")
            if len(array) and (array.min() < least or (most is not None and array.max() > most)):
                raise ValueError(f"{name}: expected numbers from {least}, got {array.min()} to {array.max()}")
        return found

    def keys(self) -> list[str]:
        return split(self.arrays("keys")[0], self.samples)

    def members(self) -> Iterator[tuple[str, Span]]:
        """Yields the same as `tar.members`, but raises nothing at a damaged part, which `about["torn"]` describes."""
        names, offset, size = self.arrays("names", "offset", "size")
        whole = self.about["shard"]["bytes"]
        if len(offset) != len(size) or len(size) > whole // BLOCKSIZE or (size > whole - offset).any():
            raise ValueError("it names places outside of the shard")
        # One at a time: Python's garbage collector takes long over many tuples.
        shard, make, texts = self.shard, tuple.__new__, split(names, len(offset))
        return ((name, make(Span, (shard, *place))) for name, *place in zip(texts, offset.tolist(), size.tolist()))

    def statistics(self) -> dict[str, np.ndarray]:
        """Reads all arrays but the places of the files."""
        names = ["keys", *SAMPLE, "characters"]
        arrays = dict(zip(names, self.arrays(*names)))
        if len(arrays["characters"]) != arrays["captions"].sum():
            raise ValueError("it has not the captions that it promises")
        split(arrays["keys"], self.samples)
        return arrays


def paths(shard: str) -> list[Path]:
    """Returns the paths where the index of a shard may lie."""
    name, other = f"{shard}{SUFFIX}", os.environ.get(FOLDER)
    return [Path(name), *([Path(other, os.path.basename(name))] if other else [])]


def opened(shard: str, path: Path) -> Index:
    """Opens an index. Raises ValueError or other errors if the file is not an index of the shard as it is now."""
    (text,) = from_npz(path, "about", max_bytes=_ABOUT)
    about = json.loads(text.tobytes())
    if about["format"] != FORMAT:
        raise ValueError(f"expected {FORMAT}, got {about['format']!r}")
    there, known = os.stat(shard), about["shard"]
    if there.st_size != known["bytes"]:
        raise ValueError(f"it was made for a shard of {known['bytes']} bytes, which has {there.st_size} now")
    if there.st_mtime_ns != known["mtime_ns"] and fingerprint(shard) != known["fingerprint"]:  # a copy may have a new time
        raise ValueError("the shard has changed since")
    if not (
        type(about["samples"]) is int
        and (about["samples"],) == header_in_npz(path, "captions")[0]
        and about["samples"] <= known["bytes"]
        and isinstance(about["torn"], str | None)
        and isinstance(about["decoded"], bool)
        and {*map(type, (*about["formats"], *about["reasons"]))} <= {str}
        and all([*map(type, both)] == [int, str] for both in about["skipped"].values())
    ):
        raise ValueError("what it says of itself cannot be")
    return Index(shard, path, about)


def _of(shard: str, use: Callable[[Index], Result]) -> Result | None:
    """Returns use(index) for the index that fits the shard as it is now; None without one. Warns of each unused index."""
    for path in paths(shard):
        if path.is_file():
            try:
                return use(opened(shard, path))
            except Exception as error:  # a damaged file raises many types
                reason = str(error) or type(error).__name__
                warnings.warn(f"{path} is not used: {reason}; make it anew by `simplclip data index`", stacklevel=3)
    return None


def load(shard: str) -> Index | None:
    return _of(shard, lambda found: found)


def members(shard: str) -> tuple[Iterator[tuple[str, Span]], str | None] | None:
    """Returns a shard's files by an index that fits, and why the tar ends early (or None); None without such an index."""
    return _of(shard, lambda found: (found.members(), found.about["torn"]))


def statistics(shard: str) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """Returns `about` and arrays of an index that fits, without the places of the files; None without such an index."""
    return _of(shard, lambda found: (found.about, found.statistics()))


def count(shard: str) -> int | None:
    """Returns the number of samples of a shard by an index that fits; None without such an index."""
    return _of(shard, lambda found: found.samples)


def fingerprint(path: str | os.PathLike) -> str:
    """Returns a hash of 64 pieces of a file, from its start to its end."""
    digest, piece = hashlib.blake2b(digest_size=16), 4096
    with open(path, "rb", buffering=0) as file:
        last = max(0, os.fstat(file.fileno()).st_size - piece)
        for place in sorted({last * i // 63 for i in range(64)}):
            digest.update(os.pread(file.fileno(), piece, place))
    return digest.hexdigest()


def identity(shard: str) -> dict[str, Any]:
    """Returns the values by which an index recognises its shard."""
    status = os.stat(shard)
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "fingerprint": fingerprint(shard)}


def write(path: Path, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    file = io.BytesIO()
    text = json.dumps({"format": FORMAT} | about).encode()
    parts: dict[str, Any] = {"about": np.frombuffer(text, np.uint8), **arrays}
    np.savez_compressed(file, **parts)
    write_atomically(path, file.getvalue())


def joined(names: list[str]) -> np.ndarray:
    return np.frombuffer("\0".join(names).encode("utf-8", "surrogateescape"), np.uint8)


def split(names: np.ndarray, count: int) -> list[str]:
    """Splits `count` names that `joined` joined. Raises ValueError before it makes a list, if there are more or fewer."""
    if len(names) and (names == 0).sum() + 1 != count or (not len(names) and count):
        raise ValueError(f"expected {count:,} names, got another number")
    return names.tobytes().decode("utf-8", "surrogateescape").split("\0") if len(names) else []
