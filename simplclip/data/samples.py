"""The files of a sample: its image, its captions, and what a teacher wrote for it.

The captions are a json's list "captions" or text "caption", else the txt, which is one caption. Two
more fields of the json are used: "group" (samples of one group show the same thing and are not each
other's negatives) and "label" (the class, for zero-shot classification).

No content of a file ends the program. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from simplclip.data.errors import BrokenSample, ShardError
from simplclip.data.images import IMAGE_SUFFIXES, decode_pil, opaque

# a teacher's features [V + C, D]: of the image or its V views, then of its C captions in order
TEACHER = "teacher.npy"
# what the features belong to: "captions" and "image", digests of these, and "views" if it saw
# views; "features", a digest of the features and the views
TEACHER_JSON = "teacher.json"
MAX_BYTES = 256 << 20  # most bytes of a file, if no other limit is given
LONGEST = 4096  # characters of a caption that are used; open_clip's tokenizer may be quadratic
_CONSTANTS = {"NaN": None, "Infinity": math.inf, "-Infinity": -math.inf}  # of a JSON text

# "__key__", "__url__", "__shard__" (the source's name), and bytes or a BrokenSample by suffix;
# "__record__" is the parsed json, once `record_of` has parsed it
Sample = dict[str, Any]


@dataclass
class Pair:
    """A parsed sample. Whether its image can be decoded is not known yet."""

    encoded: bytes  # the image file
    captions: list[str]
    record: dict[str, Any]  # the json, or {}
    key: str
    url: str  # the tar or folder
    shard: str  # its name in messages and seeds
    features: np.ndarray | None = None  # a teacher's, float16 [V + C, D]
    # the views that the teacher saw, see `transforms.View`; None: the plain image
    views: list[dict[str, Any]] | None = None
    label: str | int | None = None  # held-out data only: name or number of the class

    @property
    def image(self) -> Image.Image:
        """The image, decoded anew each time: RGB, black where it is wholly transparent."""
        return opaque(decode_pil(self.encoded))

    @property
    def name(self) -> str:
        """The name of the sample in messages and seeds, SHARD/KEY."""
        return f"{self.shard}/{self.key}"

    @property
    def group(self) -> str | None:
        """The json's "group": samples of one group match each other, so they are no negatives."""
        return text_of(self.record, "group")

    @property
    def group_id(self) -> int:
        """Hash of the group, else of the sample's name, as int64."""
        return _group_id(self.group, self.name)


def text_of(record: dict[str, Any], name: str) -> str | None:
    """Returns a value of a json as text; None for null, for an empty text and without the value."""
    value = record.get(name)
    return None if value is None else str(value) or None


def _group_id(group: str | None, name: str) -> int:
    # by the shard's name too, since keys often repeat in every shard
    return stable_hash(f"key/{name}" if group is None else f"group/{group}") >> 1


def is_held_out(sample: Sample, share: float) -> bool:
    """Whether a sample is in the share, 0 to 1, that evaluation reads and training skips.

    The hash of its group tells, else of the image's path in its json's "source", else of the
    sample's name. A sample whose json is broken is not held out.
    """
    if not share:
        return False
    try:
        record = record_of(sample)
    except BrokenSample:
        return False
    group, source = text_of(record, "group"), source_of(record)
    hashed = _group_id(group, sample_name(sample))
    if group is None and source is not None and "://" not in source:
        # copies of a collection have the same paths, and may have other formats
        path, ending = os.path.splitext(source.partition("/")[2])
        if ending[1:].lower() not in IMAGE_SUFFIXES:
            path += ending
        if path:
            hashed = stable_hash(f"picture/{path}") >> 1
    return hashed < share * 2**63


def sample_name(sample: Sample) -> str:
    """Returns the name of a sample, see `Pair.name`."""
    return f"{sample['__shard__']}/{sample['__key__']}"


def described(sample: Sample) -> str:
    """Returns the name of a broken sample for a message, with its source if it has one."""
    source = None
    with contextlib.suppress(BrokenSample):
        source = source_of(record_of(sample))
    return sample_name(sample) if source is None else f"{sample_name(sample)}, source {source}"


def source_of(record: dict[str, Any]) -> str | None:
    """Returns the json's "source", in which `pack` names the user's file or row; else None."""
    source = record.get("source")
    return source if isinstance(source, str) and source else None


def parse(sample: Sample, teacher: bool = False) -> Pair:
    """Returns the parsed files of a sample, with `teacher` also its features.

    Raises BrokenSample, also for features of another image or other captions, and ShardError if
    they are missing.
    """
    record = record_of(sample)
    pair = pair_of(sample, captions_of(sample, record))
    if teacher:
        pair.features, pair.views = _features(sample, pair)
    return pair


def pair_of(sample: Sample, captions: list[str]) -> Pair:
    """Returns a sample with these captions as a Pair.

    Raises BrokenSample without an image, and if a file was not read, e.g. since it is too large.
    """
    for value in sample.values():
        if isinstance(value, BrokenSample):
            raise value
    image = next((sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample), None)
    if image is None:
        raise BrokenSample("missing image")
    place = sample["__key__"], sample["__url__"], sample["__shard__"]
    return Pair(image, captions, record_of(sample), *place)


def record_of(sample: Sample) -> dict[str, Any]:
    """Returns the parsed json of a sample, {} without one, and keeps it under "__record__".

    Raises BrokenSample if it is no JSON object.
    """
    if "__record__" not in sample:
        content = sample.get("json", b"{}")
        if isinstance(content, BrokenSample):
            raise content
        try:
            record = json_of(content)
        except ValueError as error:
            raise BrokenSample("bad json", error) from None
        if not isinstance(record, dict):
            raise BrokenSample("bad json", f"expected an object, got {type(record).__name__}")
        sample["__record__"] = record
    return sample["__record__"]


def captions_of(sample: Sample, record: dict[str, Any], *, txt_lines: bool = False) -> list[str]:
    """Returns a sample's captions, at least one: the json's "captions", else "caption", else txt.

    txt_lines: each line of the txt is a caption, as in clip-benchmark's layout; else the txt is
    one, its white space joined. Raises BrokenSample.
    """
    several = record.get("captions")
    forms = [several if isinstance(several, list) else [], [record.get("caption")]]
    txt = sample.get("txt", b"")
    if isinstance(txt, BrokenSample):
        raise txt
    try:
        text = txt.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BrokenSample("caption not UTF-8", error) from None
    forms.append(text.splitlines() if txt_lines else [" ".join(text.split())])
    for values in forms:
        captions = [clean(value) for value in values if isinstance(value, str)]
        if any(captions):
            return [caption for caption in captions if caption]
    any_text = any(isinstance(value, str) for value in [*forms[0], *forms[1]])
    raise BrokenSample("empty caption" if any_text or "txt" in sample else "missing caption")


def label_of(sample: Sample, record: dict[str, Any]) -> str | int | None:
    """Returns a sample's class: the number in its cls, else the json's "label", else None."""
    if "cls" not in sample:
        return clean(text_of(record, "label") or "") or None
    try:
        return int(sample["cls"])
    except ValueError:
        detail = f"expected the number of a class, got {sample['cls'][:40]!r}"
        raise BrokenSample("bad cls", detail) from None


def _features(sample: Sample, pair: Pair) -> tuple[np.ndarray, list[dict[str, Any]] | None]:
    """Returns a teacher's features of a sample, and the views it saw, None for the plain image."""
    if TEACHER not in sample:
        decode_pil(pair.encoded)  # a broken image has no features
        raise ShardError(
            f"sample {pair.key!r} of shard {pair.url!r} has no teacher features ({TEACHER}); make "
            "them by `simplclip teacher`"
        )
    try:
        features = np.lib.format.read_array(io.BytesIO(sample[TEACHER]), allow_pickle=False)
        about = json_of(sample.get(TEACHER_JSON, b"{}"))
        views = about.get("views") or None
        if about.get("features", "") not in ("", digest_of_features(sample[TEACHER], views)):
            raise ValueError("expected the bytes that were written, got others")
        if features.dtype != np.float16 or features.ndim != 2 or not np.isfinite(features).all():
            got = f"{features.dtype} {list(features.shape)}"
            raise ValueError(f"expected finite float16 [V + C, D], got {got}")
        rows = len(pair.captions) + (1 if views is None else len(views))
        digests = digests_of(pair)
        stale = [name for name in digests if about.get(name, digests[name]) != digests[name]]
    except Exception as error:  # the type depends on the damage
        raise BrokenSample("bad teacher features", error) from None
    if stale or len(features) != rows:
        decode_pil(pair.encoded)  # an image that broke since is no other one
        changed = "another image" if stale == ["image"] else "other captions"
        raise BrokenSample(f"teacher features of {changed}")
    return features, views


def digests_of(pair: Pair) -> dict[str, str]:
    """Returns {"captions", "image"}, by which a sidecar tells that its sample has changed."""
    return {"captions": digest_of(pair.captions), "image": f"{zlib.crc32(pair.encoded):08x}"}


def digest_of_features(npy: bytes, views: list[dict[str, Any]] | None) -> str:
    """Returns a digest of a teacher.npy and the views in its teacher.json, to notice damage."""
    return f"{zlib.crc32(npy + json.dumps(views).encode()):08x}"


def digest_of(values: Sequence[object]) -> str:
    """Returns a digest of a list of JSON values, 16 hexadecimal digits."""
    return f"{stable_hash(json.dumps(values)):016x}"


def stable_hash(text: str) -> int:
    """Returns a hash of a text, 0 to 2**64 - 1, the same in every process and version."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def clean(text: str) -> str:
    """Returns a caption or name without white space at its ends, cut to LONGEST characters.

    NUL at its ends goes too, since a computer that lost power leaves files of zeros; a lone
    surrogate becomes "?".
    """
    text = text.removeprefix("\ufeff").strip("\0").strip()[:LONGEST].rstrip()
    return text.encode("utf-8", "replace").decode()


def json_of(data: str | bytes) -> Any:
    """Returns the value that a JSON text stands for; NaN, as pandas has missing values, is None.

    Raises ValueError for any error in it.
    """
    try:
        return json.loads(data, parse_constant=_CONSTANTS.__getitem__)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def file_bytes(path: str | os.PathLike, limit: int = MAX_BYTES) -> bytes:
    """Returns a file's bytes. Raises OSError, and BrokenSample above `limit`."""
    if os.path.exists(path) and not os.path.isfile(path):  # a named pipe may never end
        raise OSError(f"expected a file, got {os.fspath(path)!r}")
    size = os.path.getsize(path)
    if size > limit:
        detail = f"{os.fspath(path)!r} of {size:,} bytes, expected at most {limit:,}"
        raise BrokenSample("file too large", detail)
    with open(path, "rb") as file:
        return file.read()
