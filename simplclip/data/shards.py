"""Reads samples from the tar files of a WebDataset.

A shard is a tar file, plain or compressed. A sample is the files of one key: an image (jpg, jpeg, png or webp) and its
captions, in json as "captions" (a list) or "caption", else in txt. The shard or a sidecar may also hold what `simplclip
teacher` writes: features of image and captions, teacher.npy, and the views of the image that the teacher saw, views.json.
The files of a local uncompressed tar are Spans, which are read when the sample is used. Broken samples raise `BrokenSample`
or are counted in a `Skipped`; a shard that cannot be opened or used raises `ShardError`.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from webdataset.tariterators import group_by_keys

from simplclip.common.errors import InputError
from simplclip.data import index, tar
from simplclip.data.addresses import StreamError, is_address, name_of, opened
from simplclip.data.arrays import from_bytes
from simplclip.data.broken import BrokenSample, ShardError, Skipped
from simplclip.data.decode import decode_pil
from simplclip.data.sidecars import PREFIX, TEACHER, VIEWS, Folders, entries, joined
from simplclip.data.tar import HOLES, MAX_BYTES, UNREAD, Span
from simplclip.data.text import BYTES as TEXT_BYTES
from simplclip.data.text import clean, json_of

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
UNREADABLE = "cannot be read"  # the reason of a broken sample whose file is gone
COUNT_LIMIT = 1 << 30  # most bytes of shards that are read to count their samples
TEXTS = ("txt", "json", "cls", VIEWS)
KNOWN = tuple(f".{suffix}" for suffix in (*IMAGE_SUFFIXES, "txt", "json", TEACHER))

Shards = Any  # what `pairs.expand` takes
Sample = dict[str, Any]  # "__key__", "__url__" (the shard), and by suffix the bytes or a Span of them; see parts.py


def check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name}: expected an integer of at least {least}, got {value!r}")


def folders_of(files: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(map(os.path.dirname, files)))


def stable_hash(text: str) -> int:
    """Returns a hash of 64 bits, the same in every process and version."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


@dataclass
class Pair:
    """A sample whose files are read. Whether its image can be decoded is not known yet."""

    encoded: bytes  # the image file
    captions: list[str]
    record: dict[str, Any]  # the json, or {}
    files: Sample  # with all bytes
    features: np.ndarray | None = None  # a teacher's [V + C, D̂]: of the image or its V views, then of its C captions in order
    views: list[dict[str, Any]] | None = None  # that the teacher saw, see `transforms.View`; None: the plain image
    label: str | int | None = None  # held-out data only: name or number of the class
    shard: str = ""  # held-out data only: the image's tar, an absolute path or an address,
    image_path: str = ""  # or else the image's own file

    @cached_property
    def image(self) -> Image.Image:
        """The decoded image, RGB. Raises BrokenSample."""
        return decode_pil(self.encoded)

    @property
    def key(self) -> str:
        return self.files["__key__"]

    @property
    def place(self) -> str:
        return place_of(self.files)

    @property
    def group(self) -> str | None:
        """The name of the thing that the image shows. Samples of one group match each other, so they are no negatives."""
        name = self.record.get("group")
        return None if name is None else str(name)

    @property
    def group_id(self) -> int:
        """Hash of the group, else of the shard's name and key (keys often repeat in every shard), as int64."""
        return stable_hash(f"key/{self.place}" if self.group is None else f"group/{self.group}") >> 1

    def without_files(self) -> Pair:
        """Returns the sample without the fields that take much memory."""
        own = {name: value for name, value in self.files.items() if name in ("__key__", "__url__", "__shard__")}
        return replace(self, encoded=b"", files=own, record={} if self.group is None else {"group": self.group})


@dataclass(frozen=True)
class _Reading:
    """How a shard is read; `read_shard` documents the fields."""

    every: bool = False
    ahead: bool = False
    indexed: bool = True
    max_bytes: int = MAX_BYTES

    def wanted(self, name: str) -> bool:
        """Whether a file may belong to a sample. The names of a sample's own fields begin with two underscores."""
        return ".__" not in name if self.every else name.lower().endswith(KNOWN)


def _members(shard: str, how: _Reading) -> Iterator[tuple[str, bytes | Span]]:
    if is_address(shard):
        with opened(shard) as file:
            yield from tar.streamed(file, shard, max_bytes=how.max_bytes, wanted=how.wanted)
    elif tar.is_compressed(shard):
        with open(shard, "rb", buffering=0) as file:
            yield from tar.streamed(file, shard, max_bytes=how.max_bytes, wanted=how.wanted)
    elif how.indexed and (known := index.members(shard)):
        found, torn = known
        yield from tar.read_ahead(shard, found) if how.ahead else found
        if torn:
            raise tarfile.ReadError(torn)
    else:
        found = tar.members(shard)
        yield from tar.read_ahead(shard, found) if how.ahead else found


def _files(shard: str, torn: list[str], how: _Reading) -> Iterator[dict[str, Any]]:
    """Yields the files of a tar that belong to samples. It ends at a damaged part, and notes the reason in `torn`."""
    any_yet = False
    try:
        for name, value in _members(shard, how):
            any_yet = True
            if how.wanted(name):
                yield {"fname": name, "data": value, "__url__": shard}
    except tar.ERRORS as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if not any_yet:
            raise ShardError(f"shard {shard!r} cannot be opened: {reason}") from error
        # An error of a disk or network may pass, and is no damage. An error in compressed data has no errno.
        if isinstance(error, StreamError) or getattr(error, "errno", None) is not None:
            raise ShardError(f"shard {shard!r} cannot be read to its end: {reason}") from error
        torn.append(reason)


def read_shard(
    shard: str,
    skipped: Skipped,
    *,
    every: bool = False,
    ahead: bool = False,
    indexed: bool = True,
    sidecars: Folders = (),
    max_bytes: int = MAX_BYTES,
) -> Iterator[Sample]:
    """Yields the samples of a tar. Damage and duplicate files are counted in `skipped`.

    Suffixes are in lower case. Only images, txt, json and a teacher's features and views are given, unless `every`.
    ahead: asks the system to read the contents ahead, since they will be used soon.
    indexed: use the shard's index, if it has one, instead of the tar's headers; the samples are the same.
    sidecars: folders whose files are joined to the samples, see `simplclip.data.sidecars`.
    max_bytes: most bytes of a sample's files in a stream; further files are not read, and `contents` raises BrokenSample.
    """
    samples = _read_shard(shard, skipped, _Reading(every, ahead, indexed, max_bytes))
    return joined(samples, shard, sidecars, skipped) if sidecars else samples


def _read_shard(shard: str, skipped: Skipped, how: _Reading) -> Iterator[Sample]:
    name = name_of(shard)
    torn: list[str] = []

    def double(error: Exception) -> bool:
        skipped.add("duplicate file in tar", name, error.args[0])
        return True

    for sample in group_by_keys(_files(shard, torn, how), handler=double):
        # If the last sample is incomplete, only the damage is counted.
        if torn and not (image_of(sample) is not None and {"txt", "json"} & sample.keys()):
            break
        yield sample
    if torn:
        skipped.add("torn tar", name, torn[0])


def check_sizes(sample: Sample, max_bytes: int = MAX_BYTES) -> None:
    """Raises BrokenSample if the files of a sample have more bytes than may be read, or if a file is sparse."""
    total = 0
    for suffix, value in sample.items():
        if not isinstance(value, bytes | Span):
            continue
        size = len(value) if isinstance(value, bytes) else value.size
        if size == HOLES:
            raise BrokenSample("sparse file", suffix)
        total += size
        if suffix in TEXTS and size > TEXT_BYTES:
            raise BrokenSample("file too large", f"{suffix} of {size:,} bytes, expected at most {TEXT_BYTES:,}")
        if total > max_bytes or (isinstance(value, Span) and value.offset == UNREAD):
            others = f", with the sample's other files {total:,}" if total > size else ""
            raise BrokenSample("file too large", f"{suffix} of {size:,} bytes{others}, expected at most {max_bytes:,}")


def contents(sample: Sample, max_bytes: int = MAX_BYTES) -> Sample:
    """Returns the sample with bytes for its Spans. Raises BrokenSample if these cannot be read or exceed `max_bytes`."""
    check_sizes(sample, max_bytes)
    spans: dict[str, dict[str, Span]] = {}
    for suffix, value in sample.items():
        if isinstance(value, Span):
            spans.setdefault(value.file, {})[suffix] = value
    if not spans:
        return sample
    found = dict(sample)
    for of_file in spans.values():
        places = list(of_file.values())
        try:
            try:
                found |= zip(of_file, tar.read(places))
            except OSError as error:
                if isinstance(error, FileNotFoundError):
                    raise
                time.sleep(0.2)  # a network's file system may recover
                found |= zip(of_file, tar.read(places))
        except OSError as error:
            raise BrokenSample(UNREADABLE, error) from None
    return found


def file_bytes(path: str | os.PathLike) -> bytes:
    """Reads a file outside of tars. Raises OSError, also if it is no regular file, and BrokenSample as `contents` does."""
    try:
        about = os.stat(path)
    except ValueError:  # a name with NUL
        about = None
    if about is None or not stat.S_ISREG(about.st_mode):  # reading a named pipe or a device may take for ever
        raise OSError(f"expected a file, got {os.fspath(path)!r}")
    return contents({"image": Span(os.fspath(path), 0, about.st_size)})["image"]


def image_of(sample: Sample) -> bytes | Span | None:
    """Returns the encoded image of a sample."""
    return next((sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample), None)


def usable(
    samples: Iterable[Sample],
    skipped: Skipped,
    use: Callable[[Pair], Any] = lambda opened: opened.image,
    max_bytes: int = MAX_BYTES,
) -> Iterator[Pair]:
    """Yields the samples that are not broken, with decoded images. Broken samples are counted in `skipped`.

    use: function that tries each sample and may raise BrokenSample. max_bytes: as for `contents`.
    """
    for sample in samples:
        try:
            opened = parse(sample, max_bytes=max_bytes)
            use(opened)
        except BrokenSample as broken:
            skipped.add(broken.args[0], place_of(sample), broken.args[1])
        else:
            yield opened


def parse(sample: Sample, teacher: bool = False, *, image: bool = True, max_bytes: int = MAX_BYTES) -> Pair:
    """Reads the files of a sample. Raises BrokenSample.

    teacher: also reads a teacher's features. image: if False, reads neither the image, which is then empty, nor prefix.npy.
    max_bytes: as for `contents`.
    """
    if not image:
        sample = {name: value for name, value in sample.items() if name not in (*IMAGE_SUFFIXES, PREFIX)} | {"png": b""}
    sample = contents(sample, max_bytes)
    record = record_of(sample)
    captions = captions_of(sample, record)
    encoded: Any = image_of(sample)
    if encoded is None:
        raise BrokenSample("missing image", "")
    opened = Pair(encoded, captions, record, sample)
    if teacher:
        opened.features, opened.views = _features(opened)
    return opened


def record_of(sample: Sample) -> dict[str, Any]:
    """Parses the json of a sample whose files are read; {} without one. Raises BrokenSample."""
    record: Any = {}
    if "json" in sample:
        try:
            record = json_of(sample["json"])
        except ValueError as error:
            raise BrokenSample("bad json", error) from None
        if not isinstance(record, dict):
            raise BrokenSample("bad json", f"expected an object, got {type(record).__name__}")
    return record


def captions_of(sample: Sample, record: dict[str, Any], *, lines: bool = False, first: bool = False) -> list[str]:
    """Returns the captions of a sample whose files are read, at least one. Raises BrokenSample.

    lines: each line of txt is a caption, as in evaluation; else all of txt is one. first: use only a json's first caption.
    """
    several, single = sample.get("__captions__", record.get("captions")), record.get("caption")
    if isinstance(several, list) and (found := not_empty(several)):
        return found[:1] if first and "__captions__" not in sample else found
    texts = [*(several if isinstance(several, list) else ()), *([single] if isinstance(single, str) else ())]
    one = not_empty(texts)[:1]
    written: list[str] = []
    if "txt" in sample and not (lines and one):  # in training a broken txt breaks a sample with a caption too
        try:
            text = sample["txt"].decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BrokenSample("caption not UTF-8", error) from None
        written = text.splitlines() if lines else [text]
    if found := one or not_empty(written):
        return found
    raise BrokenSample("empty caption" if texts or several == [] or "txt" in sample else "missing caption", "")


def label_of(sample: Sample, record: dict[str, Any]) -> str | int | None:
    """Returns the name or number of a sample's class, None if it has none. Raises BrokenSample."""
    if "cls" in sample:
        try:
            return int(sample["cls"])
        except ValueError:
            raise BrokenSample("bad cls", f"expected the number of a class, got {sample['cls'][:40]!r}") from None
    label = sample.get("__label__")
    return label if label is not None or record.get("label") is None else clean(str(record["label"]))


def not_empty(texts: list[Any]) -> list[str]:
    """Cleans texts by `text.clean`; returns those that are not empty."""
    return [cleaned for text in texts if isinstance(text, str) and (cleaned := clean(text))]


def _features(opened: Pair) -> tuple[np.ndarray, list[dict[str, Any]] | None]:
    """Returns a teacher's features of a sample, float16 or bfloat16 (stored as uint16), and the views that it saw."""
    files, captions, views = opened.files, len(opened.captions), None
    place = f"sample {files['__key__']!r} of shard {files['__url__']!r}"
    if TEACHER not in files:
        if opened.encoded:
            decode_pil(opened.encoded)  # raises BrokenSample: a broken image has no features
        raise ShardError(f"{place} has no teacher features ({TEACHER}); make them by `simplclip teacher`")
    try:
        features = from_bytes(files[TEACHER])
        if features.dtype not in (np.float16, np.uint16) or features.ndim != 2:
            raise ValueError(f"expected float16 or uint16 [1 + C, D], got {features.dtype} {list(features.shape)}")
        if VIEWS in files:
            views = json_of(files[VIEWS])
            if not views or not all(isinstance(view, dict) for view in views):
                raise ValueError(f"expected views, got {str(views)[:100]}")
    except Exception as error:  # the type depends on the damage
        raise BrokenSample("bad teacher features", error) from None
    images = 1 if views is None else len(views)
    if len(features) != images + captions:
        seen = "" if views is None else f"{images} views and "
        raise ShardError(
            f"{place} has teacher features of {seen}{len(features) - images} captions, but {captions} captions: "
            "the captions have changed since; run `simplclip teacher` on these shards and captions again"
        )
    return features, views


def prefix_output(sample: Sample, shape: tuple[int, ...], number: int, views: int) -> np.ndarray:
    """Reads the output of an image tower's frozen prefix for view `number` of a sample's `views`: float16 of `shape`.

    No other bytes of prefix.npy are read. Raises BrokenSample if they cannot be read, ShardError if the file's size differs.
    """
    span, size = sample[PREFIX], 2 * math.prod(shape)
    header = span.size - views * size
    if not 0 < header <= 256:
        raise ShardError(
            f"sample {place_of(sample)!r} has a {PREFIX} of {span.size:,} bytes, expected {views} views of {size:,} bytes"
        )
    data = contents({PREFIX: span._replace(offset=span.offset + header + number * size, size=size)})[PREFIX]
    return np.frombuffer(data, np.float16).reshape(shape)


def teacher_stamp(shards: list[str], folders: Folders = ()) -> dict[str, Any]:
    """Returns the teacher of the features: "name", "width" D̂, "logit_scale", and "views" if it saw views of the images.

    The teacher is taken from the last of the sidecars' `folders` whose meta.json names one, else from the meta.json beside
    the shards.
    Raises ShardError if there is no teacher, or if the folders of the shards have different teachers.
    """
    for folder in reversed(folders):
        if (found := _stamp(os.path.expanduser(folder))) is not None:
            return found
    beside = folders_of(shards)
    stamps = [_stamp(folder) for folder in beside]
    for folder, stamp in zip(beside, stamps):
        if stamp is None:
            names = " or ".join(os.path.join(place, "meta.json") for place in (*folders, folder))
            raise ShardError(
                f"shards: expected a teacher's features, but no teacher is named in {names}; make them by "
                "`simplclip teacher`, and name the folder that it writes in data.sidecars"
            )
        if stamp != stamps[0]:
            raise ShardError(f"shards: expected features of one teacher, got different ones in {beside[0]!r} and {folder!r}")
    return stamps[0]


def _stamp(folder: str | os.PathLike) -> dict[str, Any] | None:
    try:
        stamp = json_of(Path(folder, "meta.json").read_text("utf-8"))["teacher"]
        return stamp | {"width": int(stamp["width"]), "logit_scale": float(stamp["logit_scale"])}
    except (OSError, ValueError, LookupError, TypeError, OverflowError):
        return None


def place_of(sample: Sample) -> str:
    """Returns the name of a sample in messages and seeds: the name of its part (`parts.Part.name`), and its key."""
    return f"{sample.get('__shard__') or name_of(sample['__url__'])}/{sample['__key__']}"


def count_samples(shards: list[str]) -> list[int] | None:
    """Counts the samples of each of `shards`, including broken ones; None if too many bytes would have to be read.

    The number comes from a meta.json beside the shard that lists it with its size, or from its index; else the shard is read.
    """
    listed = {folder: _listed_counts(folder) for folder in folders_of(shards)}
    known = {s: listed[os.path.dirname(s)].get((os.path.basename(s), os.path.getsize(s))) for s in shards}
    known |= {shard: index.count(shard) for shard, count in known.items() if count is None}
    unknown = [shard for shard, count in known.items() if count is None]
    if sum(map(os.path.getsize, unknown)) > COUNT_LIMIT:
        return None
    for shard in unknown:
        known[shard] = sum(1 for _ in read_shard(shard, Skipped()))
    return [known[shard] for shard in shards]


def _listed_counts(folder: str) -> dict[tuple[str, int], int]:
    """Returns the samples of each (shard, bytes) that the folder's meta.json lists, if there is one."""
    try:
        found = entries(folder).items()
        return {(name, int(entry["bytes"])): int(entry["samples"]) for name, entry in found}
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
        return {}
