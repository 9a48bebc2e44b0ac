"""Parses the files of a sample: its image, its captions, and what a teacher wrote for it.

The captions are a json's list "captions" or text "caption", else the txt, which is one caption. Two more fields of the json
are used: "group" (samples of one group show the same thing and are not each other's negatives) and "label" (the class, for
zero-shot classification).
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from simplclip.data.decode import decode_pil
from simplclip.data.errors import BrokenSample, ShardError
from simplclip.data.files import IMAGE_SUFFIXES, captions_of, clean, json_of, record_of
from simplclip.data.tars import Sample

TEACHER = "teacher.npy"  # a teacher's features [V + C, D]: of the image or its V views, then of its C captions in order
TEACHER_JSON = "teacher.json"  # what the features belong to: "captions", a digest of them, and "views" if it saw views


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
    views: list[dict[str, Any]] | None = None  # that the teacher saw, see `transforms.View`; None: the plain image
    label: str | int | None = None  # held-out data only: name or number of the class

    @cached_property
    def image(self) -> Image.Image:
        """The decoded image, RGB. Raises BrokenSample."""
        return decode_pil(self.encoded)

    @property
    def place(self) -> str:
        """The name of the sample in messages and seeds."""
        return f"{self.shard}/{self.key}"

    @property
    def group(self) -> str | None:
        """The name of the thing that the image shows. Samples of one group match each other, so they are no negatives."""
        name = self.record.get("group")
        return None if name is None else str(name)

    @property
    def group_id(self) -> int:
        """Hash of the group, else of the shard's name and key (keys often repeat in every shard), as int64."""
        return stable_hash(f"key/{self.place}" if self.group is None else f"group/{self.group}") >> 1


def place_of(sample: Sample) -> str:
    """Returns the name of a sample in messages and seeds: the name of its shard, and its key."""
    return f"{sample['__shard__']}/{sample['__key__']}"


def parse(sample: Sample, teacher: bool = False) -> Pair:
    """Parses the files of a sample. teacher: also a teacher's features.

    Raises BrokenSample, and ShardError if the features are missing or belong to other captions.
    """
    check_files(sample)
    record = record_of(sample)
    captions = captions_of(sample, record)
    pair = Pair(image_of(sample), captions, record, sample["__key__"], sample["__url__"], sample["__shard__"])
    if teacher:
        pair.features, pair.views = _features(sample, pair)
    return pair


def check_files(sample: Sample) -> None:
    """Raises BrokenSample if a file of the sample was not read, e.g. since it is too large."""
    for value in sample.values():
        if isinstance(value, BrokenSample):
            raise value


def image_of(sample: Sample) -> bytes:
    """Returns the encoded image of a sample. Raises BrokenSample if it has none."""
    for suffix in IMAGE_SUFFIXES:
        if suffix in sample:
            return sample[suffix]
    raise BrokenSample("missing image", "")


def label_of(sample: Sample, record: dict[str, Any]) -> str | int | None:
    """Returns the name or number of a sample's class, None if it has none. Raises BrokenSample."""
    if "cls" in sample:
        try:
            return int(sample["cls"])
        except ValueError:
            raise BrokenSample("bad cls", f"expected the number of a class, got {sample['cls'][:40]!r}") from None
    return None if record.get("label") is None else clean(str(record["label"]))


def digest_of(captions: list[str]) -> str:
    """Returns the digest of captions that a sidecar records with their features, 16 hexadecimal digits."""
    return f"{stable_hash(json.dumps(captions)):016x}"


def _features(sample: Sample, pair: Pair) -> tuple[np.ndarray, list[dict[str, Any]] | None]:
    """Returns a teacher's features of a sample, float16 [V + C, D], and the views that it saw."""
    place = f"sample {pair.key!r} of shard {pair.url!r}"
    again = "the captions have changed since; run `simplclip teacher` on these shards and captions again"
    if TEACHER not in sample:
        decode_pil(pair.encoded)  # raises BrokenSample: a broken image has no features
        raise ShardError(f"{place} has no teacher features ({TEACHER}); make them by `simplclip teacher`")
    try:
        features = np.lib.format.read_array(io.BytesIO(sample[TEACHER]), allow_pickle=False)
        about = json_of(sample[TEACHER_JSON]) if TEACHER_JSON in sample else {}
        views = about.get("views")
        if features.dtype != np.float16 or features.ndim != 2:
            raise ValueError(f"expected float16 [V + C, D], got {features.dtype} {list(features.shape)}")
        if views is not None and not (views and isinstance(views, list) and all(isinstance(view, dict) for view in views)):
            raise ValueError(f"expected views, got {str(views)[:100]}")
    except Exception as error:  # the type depends on the damage
        raise BrokenSample("bad teacher features", error) from None
    images, captions = len(views or [None]), len(pair.captions)
    if len(features) != images + captions:
        seen = "" if views is None else f"{images} views and "
        raise ShardError(
            f"{place} has teacher features of {seen}{len(features) - images} captions, but {captions} captions: {again}"
        )
    if "captions" in about and about["captions"] != digest_of(pair.captions):
        raise ShardError(f"{place} has teacher features of other captions than {pair.captions[0][:80]!r} ...: {again}")
    return features, views


def stable_hash(text: str) -> int:
    """Returns a hash of 64 bits, the same in every process and version."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
