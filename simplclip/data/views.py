"""Views: augmentations of an image that are drawn once, stored and replayed: teacher and student see the same pixels."""

from __future__ import annotations

import json
from dataclasses import asdict, is_dataclass
from typing import Any

from simplclip.data.decode import size_of
from simplclip.data.epoch import seeded
from simplclip.data.shards import Opened
from simplclip.data.transforms import ImageTransform, View


def draw(transform: ImageTransform, sample: Opened, number: int, seed: int) -> list[View]:
    """`number` views of a sample's image; they depend on the seed, the shard's name, the key and each one's number only."""
    height, width = size_of(sample.encoded, transform.max_pixels)
    views = []
    for view in range(number):
        with seeded(seed, "view", sample.place, view):
            views.append(transform.draw(height, width))
    return views


def augmentation(transform: Any) -> Any:
    """The augmentation that a transform draws, as a JSON value to compare: "none", "affine" or open_clip's fields."""
    augment = getattr(transform, "augment", repr(transform))
    return json.loads(json.dumps(asdict(augment))) if is_dataclass(augment) else augment or "none"
