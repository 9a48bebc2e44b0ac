"""`simplclip teacher`: writes a teacher's features of shards into sidecars, so that training never
loads a teacher.

KEY.teacher.npy    float16 [V + C, D] with rows of norm 1: the features of the image or of its V
                   views, then of its C captions
KEY.teacher.json   {"captions", "image": digests of these captions and of the image, "views": what
                   was drawn for each view}
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from open_clip.model import get_model_preprocess_cfg
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor

from simplclip.common import hardware, ranks
from simplclip.common.errors import InputError, check_count
from simplclip.data import tars
from simplclip.data.errors import BrokenSample, Skipped
from simplclip.data.images import open_image
from simplclip.data.loader import seeded
from simplclip.data.pack import packed
from simplclip.data.samples import TEACHER, TEACHER_JSON, Pair, digests_of, parse
from simplclip.data.sidecars import Folders
from simplclip.data.sources import sources_of
from simplclip.data.transforms import ImageTransform, View, augmentation, finished, stack
from simplclip.data.writer import write_sidecars
from simplclip.evaluation import Encoder, load, recall
from simplclip.models.trained import image_transform
from simplclip.train import config as configs


@dataclass
class Views:
    """The views of each image that a teacher sees: `number` views, drawn from the augmentation of a
    student's transform.
    """

    transform: ImageTransform
    number: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("views", self.number, 1)
        if augmentation(self.transform) == "none":
            raise InputError(
                "views: expected a transform that augments, got one without, whose views are all "
                "equal"
            )

    def draw(self, sample: Pair) -> list[View]:
        """Draws the views of a sample's image.

        A view depends on the seed, the shard's name, the key and its number only.
        """
        image = open_image(sample.encoded)
        views = []
        for view in range(self.number):
            with seeded(self.seed, "view", sample.place, view):
                views.append(self.transform.draw(image.height, image.width))
        return views

    def stamp(self) -> dict[str, Any]:
        return {"number": self.number, "augment": augmentation(self.transform), "seed": self.seed}


class Batch(NamedTuple):
    """What workers make of N samples."""

    images: Tensor  # uint8 [N V, 3, S, S]
    tokens: Tensor  # int64 [sum of C, L]
    captions: list[int]  # C of each sample
    about: list[dict[str, Any]]  # the content of each teacher.json


@dataclass
class Prepare:
    """Makes the inputs of a teacher, in workers. An image is decoded once for all its views."""

    transform: ImageTransform  # the teacher's
    tokenizer: Callable[[list[str]], Tensor]
    views: Views | None

    def __call__(self, sample: Pair) -> tuple[list[Tensor], Tensor, dict[str, Any]]:
        drawn = self.views.draw(sample) if self.views else []
        images = (
            self.transform.apply_all(sample.encoded, drawn)
            if drawn
            else [self.transform(sample.encoded)]
        )
        about = digests_of(sample) | ({"views": drawn} if drawn else {})
        return images, self.tokenizer(sample.captions), about

    def collate(self, prepared: list[tuple]) -> Batch:
        images, tokens, about = zip(*prepared)
        pixels = [image for several in images for image in several]
        return Batch(
            stack(pixels), torch.cat(tokens), [len(several) for several in tokens], list(about)
        )


def write(
    shards: Any,
    out: str | os.PathLike,
    teacher: Encoder,
    *,
    views: Views | None = None,
    batch_size: int = 64,
    **options: Any,
) -> dict[str, Any]:
    """Writes a sidecar of each shard to the folder `out`, see the top of this file; meta.json has
    the teacher.

    Args:
        shards: tars, see `data.writer.write_sidecars`, which also documents errors, continuation
            and the returned dict.
        views: views of the images in place of the images, not augmented. Training replays one of
            them in each epoch.
        batch_size: samples, views or captions that are encoded at a time.
        options: workers, sidecars, progress of `data.writer.write_sidecars`.
    """
    prepare = Prepare(transform_of(teacher), teacher.tokenizer, views)

    def process(batch: Batch) -> list[dict[str, bytes]]:
        images = finished(prepare.transform, batch.images, teacher.device)
        x = torch.cat([teacher.features("image", part) for part in images.split(batch_size)]).cpu()
        y = encode_tokens(teacher, batch.tokens, batch_size).cpu()
        rows = zip(x.unflatten(0, (len(batch.about), -1)), y.split(batch.captions), batch.about)
        return [
            {TEACHER: _npy(torch.cat([i, t])), TEACHER_JSON: json.dumps(about).encode()}
            for i, t, about in rows
        ]

    stamp = (
        teacher.stamp() | {"dtype": "fp16"} | ({} if views is None else {"views": views.stamp()})
    )
    made: dict[str, Any] = {
        "collate": prepare.collate,
        "stamp": {"teacher": stamp},
        "batch_size": batch_size,
    }
    return write_sidecars(shards, out, prepare, process, title="teacher", **made, **options)


def encode_tokens(teacher: Encoder, tokens: Tensor, batch_size: int) -> Tensor:
    """Returns features float32 [N, width] of captions as int64 [N, L]; equal ones are encoded once,
    long ones together.
    """
    different, rows = tokens.unique(dim=0, return_inverse=True)
    order = (different != 0).sum(1).argsort(stable=True)
    features = torch.cat(
        [teacher.features("text", part) for part in different[order].split(batch_size)]
    )
    return features[order.argsort()[rows]]


def transform_of(teacher: Encoder) -> ImageTransform:
    """Returns the ImageTransform that makes the pixels of a teacher's preprocessing.

    Raises InputError for another one.
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


def student_transform(config: str | os.PathLike) -> ImageTransform:
    """Returns the training transform of a student's config, a file or the name of a built-in one.

    Raises InputError for an augmentation whose draws cannot be stored, such as timm's.
    """
    student = configs.load(config, ())
    transform = image_transform(
        student.model.model_dump(), train=True, augment=student.data.augment
    )
    if not isinstance(transform, ImageTransform):
        raise InputError(
            "data.augment: expected one whose draws can be stored (without use_timm), got "
            f"{transform!r}"
        )
    return transform


def run(
    data: Any,
    out: str | os.PathLike,
    name: str,
    *,
    checkpoint: str | os.PathLike | None = None,
    views: int = 0,
    config: str | os.PathLike | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    **options: Any,
) -> dict[str, Any]:
    """Writes the features of a teacher, see `simplclip.load`, to the folder `out`; returns the
    summary of `write`.

    data: as `data.pack.packed` takes them; shards of tables, JSON files and folders are made in
    OUT/shards. views, config, seed: number of views, the student whose augmentation they have, and
    the seed of their draws. options: batch_size, sidecars, workers of `write`.
    """
    if bool(views) != (config is not None):
        raise InputError(
            f"views, config: expected both or none, got {views} views and the config {config!r}"
        )
    seen = Views(student_transform(config), views, seed) if config is not None else None
    place = ranks.device(device)
    precision, _ = hardware.pick_precision(precision, place)
    teacher = load(name, checkpoint, device=place, precision=precision)
    shards = ranks.on_first(partial(packed, data, os.path.join(out, "shards")))
    summary = write(shards, out, teacher, views=seen, **options)
    if ranks.first():
        what = "" if seen is None else f" of {seen.number} views of each image"
        features = f"features of {teacher.name}{what}, width {teacher.width}"
        print(f"wrote {summary['path']}: {summary['samples']:,} samples with {features}")
        print(own_recall(shards, [*options.get("sidecars", ()), out]))
    return summary


def own_recall(shards: Any, sidecars: Folders, most: int = 1000) -> str:
    """Says how well a teacher finds the pairs of the first samples by its stored features: whether
    it is of any use.
    """
    raw = chain.from_iterable(
        tars.read(source, Skipped(), sidecars=sidecars) for source in sources_of(shards)
    )
    pairs: list[Pair] = []
    for sample in (sample for sample in raw if TEACHER in sample):
        with contextlib.suppress(BrokenSample):
            pairs.append(parse(sample, teacher=True))
        if len(pairs) == most:
            break
    if not pairs:
        return "the teacher's own R@1: no sample has features"
    x = torch.stack([torch.from_numpy(pair.features[0]) for pair in pairs]).float()
    y = torch.stack(
        [torch.from_numpy(pair.features[-len(pair.captions)]) for pair in pairs]
    ).float()
    groups = torch.tensor([pair.group_id for pair in pairs])
    ways = {
        "image to text": recall(x, y, groups, groups)["R@1"],
        "text to image": recall(y, x, groups, groups)["R@1"],
    }
    figures = ", ".join(
        f"{way} {figure.value:.1%} (chance {figure.chance:.1%})" for way, figure in ways.items()
    )
    useless = all(figure.value < min(0.5, 3 * figure.chance) for figure in ways.values())
    warning = (
        "\nwarning: it hardly knows these pairs; a student would learn little from it"
        if useless
        else ""
    )
    return f"the teacher's own R@1 on the first {len(pairs):,} samples: {figures}{warning}"


def _npy(rows: Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, rows.half().numpy(), allow_pickle=False)
    return file.getvalue()
