"""Reading samples from the tar files of a WebDataset.

A shard is a local tar file, plain or compressed. A sample is the files of one key: an image (jpg, jpeg, png
or webp) and its caption: json with "captions" (a list) or "caption", else txt; and, if `simplclip teacher` wrote the
shard, a teacher's features of both: teacher.npy. Broken samples raise `BrokenSample` or are counted in a `Skipped`; a shard
that cannot be opened or used raises `ShardError`.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import lzma
import os
import tarfile
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np
from PIL import Image, UnidentifiedImageError
from webdataset.tariterators import group_by_keys

from simplclip.common.errors import InputError, UserError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
TEACHER = "teacher.npy"
COUNT_LIMIT = 1 << 30  # most bytes of shards that are read to count their samples

_TAR_ERRORS = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError)

Shards = str | os.PathLike | Iterable[str | os.PathLike]  # path, brace expression or glob of local tar files, or several
Sample = dict[str, Any]  # "__key__", "__url__" (the shard) and the bytes by suffix


class ShardError(UserError, RuntimeError):
    """A shard cannot be opened, or lacks the files that are needed; the message names it."""


class BrokenSample(Exception):
    """A sample is broken: `args` are the reason under which it is counted, and a detail."""


@dataclass
class Skipped:
    """Counts of broken samples by reason, and the first sample of each reason with a detail."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, place: str, detail: object = "") -> None:
        self.counts[reason] += 1
        self.examples.setdefault(reason, f"{place}: {detail}" if str(detail) else place)

    def merge(self, other: Skipped) -> None:
        self.counts += other.counts
        self.examples = other.examples | self.examples

    def take(self) -> Skipped:
        """Returns and removes what was added since the last call."""
        taken = Skipped(self.counts, self.examples)
        self.counts, self.examples = Counter(), {}
        return taken

    def __str__(self) -> str:
        reasons = [f"{n} {reason} (first: {self.examples[reason]})" for reason, n in self.counts.most_common()]
        return f"{self.counts.total()} skipped" + (": " + ", ".join(reasons) if reasons else "")


def check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name}: expected an integer of at least {least}, got {value!r}")


def expand(shards: Shards) -> list[str]:
    """The files of `shards`: paths, brace expressions (train-{000000..000003}.tar), globs, or a list of them.

    Raises InputError for a pattern without a match or a path that is not a file.
    """
    patterns = [shards] if isinstance(shards, (str, os.PathLike)) else list(shards)
    if not patterns:
        raise InputError("shards: expected at least one path or pattern, got an empty list")
    files = []
    for pattern in (os.path.expanduser(os.fspath(pattern)) for pattern in patterns):
        for path in [pattern] if os.path.exists(pattern) else braceexpand.braceexpand(pattern):
            matches = sorted(glob.glob(path)) if glob.has_magic(path) and not os.path.exists(path) else [path]
            if not matches:
                raise InputError(f"shards: expected files, got the pattern {path!r}, which matches none")
            for match in matches:
                if not os.path.isfile(match):
                    what = "is a folder (try its *.tar)" if os.path.isdir(match) else "does not exist"
                    raise InputError(f"shards: expected a tar file, got {match!r}, which {what}")
            files += matches
    return files


def folders_of(files: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(map(os.path.dirname, files)))


def stable_hash(text: str) -> int:
    """64 bits, the same in every process and version."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


@dataclass
class Opened:
    """A sample that is not broken."""

    image: Image.Image  # RGB
    captions: list[str]  # at least one
    record: dict[str, Any]  # the json, or {}
    files: Sample
    features: np.ndarray | None = None  # a teacher's, float16 [1 + C, D̂]: the image's, then those of its C captions in order

    @property
    def place(self) -> str:
        return place_of(self.files)

    @property
    def group(self) -> int:
        # Keys often repeat in every shard; without the shard's name unrelated samples would share a group.
        named = self.record.get("group") is not None
        return stable_hash(f"group/{self.record['group']}" if named else f"key/{self.place}") >> 1


class _Header(tarfile.TarInfo):
    """Raises for unreadable headers, all but the first of which tarfile takes for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            if tar.offset == 0:
                raise
            raise tarfile.ReadError(f"{error} at byte {tar.offset}") from None


def _files(shard: str, torn: list[str], contents: bool, every: bool) -> Iterator[dict[str, Any]]:
    """The files of a tar that belong to samples. A damaged part ends them and is noted in `torn`."""
    known = tuple(f".{suffix}" for suffix in (*IMAGE_SUFFIXES, "txt", "json", TEACHER))
    try:
        tar = tarfile.open(shard, "r|*", tarinfo=_Header)  # noqa: SIM115
    except _TAR_ERRORS as error:
        raise ShardError(f"shard {shard!r} cannot be opened: {error or type(error).__name__}") from error
    with tar:
        try:
            while (member := tar.next()) is not None:
                tar.members = []  # tarfile would keep every header
                if member.isreg() and (every or member.name.lower().endswith(known)):
                    data = tar.extractfile(member).read() if contents else b""
                    yield {"fname": member.name, "data": data, "__url__": shard}
        except _TAR_ERRORS as error:
            torn.append(str(error) or type(error).__name__)


def read_shard(shard: str, skipped: Skipped, *, contents: bool = True, every: bool = False) -> Iterator[Sample]:
    """The samples of a tar. Damage and duplicate files are counted in `skipped`.

    Suffixes are in lower case. Only images, txt, json and a teacher's features are read, unless `every`.
    """
    name, torn = os.path.basename(shard), []

    def double(error: Exception) -> bool:
        skipped.add("duplicate file in tar", name, error.args[0])
        return True

    for sample in group_by_keys(_files(shard, torn, contents, every), handler=double):
        # If the last sample is incomplete, only the damage is counted.
        if torn and not (image_of(sample) is not None and {"txt", "json"} & sample.keys()):
            break
        yield sample
    if torn:
        skipped.add("torn tar", name, torn[0])


def image_of(sample: Sample) -> bytes | None:
    """The encoded image of a sample."""
    return next((sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample), None)


def usable(samples: Iterable[Sample], skipped: Skipped, teacher: bool = False) -> Iterator[Opened]:
    """The samples that are not broken; the others are counted in `skipped`. teacher: with a teacher's features."""
    for sample in samples:
        try:
            opened = open_sample(sample, teacher)
        except BrokenSample as broken:
            skipped.add(broken.args[0], place_of(sample), broken.args[1])
        else:
            yield opened


def open_sample(sample: Sample, teacher: bool = False) -> Opened:
    record: Any = {}
    if "json" in sample:
        try:
            record = json.loads(sample["json"])
        except (ValueError, RecursionError) as error:
            raise BrokenSample("bad json", error) from None
        if not isinstance(record, dict):
            raise BrokenSample("bad json", f"expected an object, got {type(record).__name__}")
    captions = captions_of(sample, record)
    data = image_of(sample)
    if data is None:
        raise BrokenSample("missing image", "")
    return Opened(decode(data), captions, record, sample, _features(sample, len(captions)) if teacher else None)


def captions_of(sample: Sample, record: dict[str, Any]) -> list[str]:
    several, single = record.get("captions"), record.get("caption")
    texts = list(several) if isinstance(several, list) else []
    if found := _not_empty(texts):
        return found
    texts += [single] if isinstance(single, str) else []
    if "txt" in sample:
        try:
            texts.append(sample["txt"].decode("utf-8"))
        except UnicodeDecodeError as error:
            raise BrokenSample("caption not UTF-8", error) from None
    if found := _not_empty(texts):
        return found[:1]
    raise BrokenSample("empty caption" if texts or several == [] else "missing caption", "")


def _not_empty(texts: list[Any]) -> list[str]:
    return [text.strip() for text in texts if isinstance(text, str) and text.strip()]


def _features(sample: Sample, captions: int) -> np.ndarray:
    place = f"sample {sample['__key__']!r} of shard {sample['__url__']!r}"
    if TEACHER not in sample:
        raise ShardError(f"{place} has no teacher features ({TEACHER}); make them by `simplclip teacher`")
    try:
        features = np.load(io.BytesIO(sample[TEACHER]), allow_pickle=False)
        if features.dtype != np.float16 or features.ndim != 2:
            raise ValueError(f"expected float16 [1 + C, D], got {features.dtype} {list(features.shape)}")
    except Exception as error:  # the type depends on the damage
        raise BrokenSample("bad teacher features", error) from None
    if len(features) != 1 + captions:
        raise ShardError(
            f"{place} has teacher features of {len(features) - 1} captions, but {captions} captions: "
            "the captions have changed since; run `simplclip teacher` on these shards again"
        )
    return features


def teacher_stamp(shards: list[str]) -> dict[str, Any]:
    """The teacher in the meta.json beside the shards: "name", "width" D̂, "logit_scale".

    Raises ShardError if there is none, or if the folders of the shards have different ones.
    """
    folders, found = folders_of(shards), []
    for folder in folders:
        try:
            stamp = json.loads(Path(folder, "meta.json").read_text("utf-8"))["teacher"]
            found.append(stamp | {"width": int(stamp["width"]), "logit_scale": float(stamp["logit_scale"])})
        except (OSError, ValueError, LookupError, TypeError):
            raise ShardError(
                f"shards: expected a teacher's features, but {os.path.join(folder, 'meta.json')} names no teacher; "
                "make them by `simplclip teacher`, and train on the folder that it writes"
            ) from None
        if found[-1] != found[0]:
            raise ShardError(f"shards: expected features of one teacher, got different ones in {folders[0]!r} and {folder!r}")
    return found[0]


def decode(data: bytes) -> Image.Image:
    """Decodes an image as RGB; transparent images are composed on white."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BrokenSample("image too large", error) from None
    except UnidentifiedImageError:
        raise BrokenSample("not an image", f"{len(data)} bytes that are not jpg, png or webp") from None
    except Exception as error:  # decoders raise many types for damaged bytes
        raise BrokenSample("not an image", error) from None
    try:
        return on_white(image) if image.has_transparency_data else image.convert("RGB")
    except Exception as error:
        raise BrokenSample("truncated image", error) from None


def on_white(image: Image.Image, size: tuple[int, int] | None = None) -> Image.Image:
    """RGB; centred on white of `size`, by default its own."""
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", size or image.size, "white")
    canvas.alpha_composite(image, ((canvas.width - image.width) // 2, (canvas.height - image.height) // 2))
    return canvas.convert("RGB")


def place_of(sample: Sample) -> str:
    """ "<shard's file name>/<key>", the name of a sample in messages and seeds."""
    return f"{os.path.basename(sample['__url__'])}/{sample['__key__']}"


def count_samples(shards: list[str]) -> int | None:
    """The number of samples of all `shards`, including broken ones; None if too many bytes would have to be read.

    It is taken from a meta.json beside a shard that lists it with its size; otherwise the shard is read.
    """
    listed = {folder: _listed_counts(folder) for folder in folders_of(shards)}
    known = {s: listed[os.path.dirname(s)].get((os.path.basename(s), os.path.getsize(s))) for s in shards}
    unknown = [shard for shard, count in known.items() if count is None]
    if sum(map(os.path.getsize, unknown)) > COUNT_LIMIT:
        return None
    for shard in unknown:
        known[shard] = sum(1 for _ in read_shard(shard, Skipped(), contents=False))
    return sum(known[shard] for shard in shards)


def _listed_counts(folder: str) -> dict[tuple[str, int], int]:
    """The samples of each (shard, bytes) that the folder's meta.json lists, if there is one."""
    try:
        splits = json.loads(Path(folder, "meta.json").read_text("utf-8"))["splits"].values()
        entries = [(name, entry) for split in splits for name, entry in split["shards"].items()]
        return {(name, int(entry["bytes"])): int(entry["samples"]) for name, entry in entries}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
