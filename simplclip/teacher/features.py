"""`simplclip teacher`: writes a teacher's features of shards into sidecars, so that training never
loads a teacher.

KEY.teacher.npy    float16 [V + C, D] with rows of norm 1: the features of the image or of its V
                   views, then of its C captions
KEY.teacher.json   {"captions", "image": digests of these captions and of the image, "views": what
                   was drawn for each view, "features": a digest of the features and the views}
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from open_clip.model import get_model_preprocess_cfg
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor

from simplclip.common import hardware, ranks
from simplclip.common.errors import InputError, check_count
from simplclip.data.images import open_image
from simplclip.data.pack import pack_shards
from simplclip.data.samples import (
    TEACHER,
    TEACHER_JSON,
    Pair,
    digest_of_features,
    digests_of,
)
from simplclip.data.sidecars import Folders, write_sidecars
from simplclip.data.transforms import (
    ImageTransform,
    View,
    augmentation,
    finish_on_device,
    seeded,
    stack_pixels,
)
from simplclip.evaluation import Encoder, load
from simplclip.models.trained import image_transform
from simplclip.train import config as configs


@dataclass
class Views:
    """The views of each image that a teacher sees, drawn by the transform of a student."""

    transform: ImageTransform
    number: int  # of each image
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("views", self.number, 1)
        if augmentation(self.transform) == "none":
            raise InputError(
                "views: expected a transform that augments, got one without, whose views are all "
                "equal"
            )

    def draw(self, sample: Pair) -> list[View]:
        """Returns `number` views of a sample's image, JSON values; may raise BrokenSample.

        A view depends on the seed, the sample's name and its number only.
        """
        image = open_image(sample.encoded)
        views = []
        for position in range(self.number):
            with seeded(self.seed, "view", sample.name, position):
                views.append(self.transform.draw(image.height, image.width))
        return views

    def stamp(self) -> dict[str, Any]:
        """Returns what meta.json says of the views: {"number", "augment", "seed"}."""
        return {"number": self.number, "augment": augmentation(self.transform), "seed": self.seed}


class Batch(NamedTuple):
    """What workers make of N samples."""

    images: Tensor  # uint8 [N V, 3, S, S]
    tokens: Tensor  # int64 [sum of C, L]
    captions: list[int]  # C of each sample
    about: list[dict[str, Any]]  # the content of each teacher.json but "features"


@dataclass
class Prepare:
    """Makes the inputs of a teacher, in workers. An image is decoded once for all its views."""

    transform: ImageTransform  # the teacher's
    tokenizer: Callable[[list[str]], Tensor]
    views: Views | None

    def __call__(self, sample: Pair) -> tuple[list[Tensor], Tensor, dict[str, Any]]:
        """Returns the images of a sample, uint8 [3, S, S], its tokens [C, L], and `Batch.about`.

        Raises BrokenSample.
        """
        about: dict[str, Any] = digests_of(sample)
        if self.views is None:
            images = [self.transform(sample.encoded)]
        else:
            views = self.views.draw(sample)
            images = self.transform.apply_views(sample.encoded, views)
            about["views"] = views
        return images, self.tokenizer(sample.captions), about

    def collate(self, prepared: list[tuple]) -> Batch:
        """Joins the results of N calls to a Batch."""
        images, tokens, about = zip(*prepared)
        counts = [len(captions) for captions in tokens]
        return Batch(
            stack_pixels(list(chain.from_iterable(images))), torch.cat(tokens), counts, [*about]
        )


def write_features(
    shards: Any,
    out: str | os.PathLike,
    teacher: Encoder,
    *,
    views: Views | None = None,
    batch_size: int = 64,
    workers: int = 0,
    sidecars: Folders = (),
    progress: bool = True,
) -> dict[str, Any]:
    """Writes a sidecar of each shard, with a teacher's features, to the folder `out`.

    Its meta.json says which teacher. All ranks have to call it. views: encoded in place of the
    images; training replays one of them in each epoch. batch_size: samples, views or captions that
    are encoded at a time. For the other arguments and errors see `write_sidecars`.
    """
    prepare = Prepare(transform_of(teacher), teacher.tokenizer, views)

    def process(batch: Batch) -> list[dict[str, bytes]]:
        """Encodes a batch; returns {suffix: bytes} of each sample: teacher.npy, teacher.json."""
        pixels = finish_on_device(prepare.transform, batch.images, teacher.device)
        images = [teacher.features("image", part) for part in pixels.split(batch_size)]
        texts = encode_tokens(teacher, batch.tokens, batch_size).cpu()
        samples = zip(
            torch.cat(images).cpu().unflatten(0, (len(batch.about), -1)),
            texts.split(batch.captions),
            batch.about,
        )
        return [_files_of(torch.cat([image, text]), about) for image, text, about in samples]

    stamp = teacher.stamp() | {"dtype": "fp16"}
    if views is not None:
        stamp["views"] = views.stamp()
    return write_sidecars(
        shards,
        out,
        prepare,
        process,
        stamp={"teacher": stamp},
        batch_size=batch_size,
        collate=prepare.collate,
        workers=workers,
        sidecars=sidecars,
        title="teacher",
        progress=progress,
    )


def encode_tokens(teacher: Encoder, tokens: Tensor, batch_size: int) -> Tensor:
    """Returns a teacher's features of captions, float32 [N, D], on its device.

    tokens: int64 [N, L], padded by 0. Equal captions are encoded once, long ones together.
    """
    different, rows = tokens.unique(dim=0, return_inverse=True)
    order = (different != 0).sum(1).argsort(stable=True)
    parts = different[order].split(batch_size)
    features = torch.cat([teacher.features("text", part) for part in parts])
    return features[order.argsort()[rows]]


def transform_of(teacher: Encoder) -> ImageTransform:
    """Returns the ImageTransform that makes the pixels of a teacher's preprocessing.

    Raises InputError for a preprocessing that is neither one nor open_clip's for evaluation.
    """
    if isinstance(teacher.preprocess, ImageTransform):
        return teacher.preprocess
    cfg = PreprocessCfg(**get_model_preprocess_cfg(teacher.model))
    if repr(image_transform_v2(cfg, is_train=False)) != repr(teacher.preprocess):
        raise InputError(
            "teacher: expected open_clip's preprocessing or an ImageTransform, got "
            f"{teacher.preprocess!r}"
        )
    return ImageTransform(cfg)


def student_transform(config: str | Path) -> ImageTransform:
    """Returns the training transform of a student's config, which draws the views."""
    student = configs.load(config, ())
    return image_transform(student.model.model_dump(), train=True, augment=student.data.augment)


def run(
    data: Any,
    out: str | os.PathLike,
    name: str,
    *,
    checkpoint: str | os.PathLike | None = None,
    views: int = 0,
    config: str | Path | None = None,
    seed: int = 0,
    batch_size: int = 64,
    workers: int = 0,
    sidecars: Folders = (),
    device: str = "auto",
    precision: str = "auto",
) -> dict[str, Any]:
    """Loads a teacher, writes its features of `data` to the folder `out`, and prints a summary.

    data: as `data.pack.pack_shards` takes them. name, checkpoint, device, precision: arguments of
    `simplclip.load`. views, config, seed: number of views, the student whose augmentation they have
    (a config's file or name), and the seed of their draws; 0 and None: the plain images.
    All ranks have to call it. Raises InputError for views without config or the reverse.
    """
    if bool(views) != (config is not None):
        raise InputError(
            f"views, config: expected both or none, got {views} views and the config {config!r}"
        )
    drawn = None
    if config is not None:
        drawn = Views(student_transform(config), views, seed)
    torch_device = ranks.set_device(device)
    precision, _ = hardware.pick_precision(precision, torch_device)
    teacher = load(name, checkpoint, device=torch_device, precision=precision)
    shards = ranks.on_first(pack_shards, data, os.path.join(out, "shards"))
    summary = write_features(
        shards,
        out,
        teacher,
        views=drawn,
        batch_size=batch_size,
        workers=workers,
        sidecars=sidecars,
    )
    if ranks.first():
        features = f"features of {teacher.name}"
        if drawn is not None:
            features += f" of {drawn.number} views of each image"
        print(
            f"wrote {summary['path']}: {summary['samples']:,} samples with {features}, width "
            f"{teacher.width}"
        )
    return summary


def _files_of(rows: Tensor, about: dict[str, Any]) -> dict[str, bytes]:
    """Returns a sample's files by suffix, of features [V + C, D] and an entry of `Batch.about`."""
    file = io.BytesIO()
    np.save(file, rows.half().numpy(), allow_pickle=False)
    npy = file.getvalue()
    about = about | {"features": digest_of_features(npy, about.get("views"))}
    return {TEACHER: npy, TEACHER_JSON: json.dumps(about).encode()}
