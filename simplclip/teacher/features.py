"""`simplclip teacher`: writes a teacher's features of shards into sidecars, and measures its retrieval.

Several teachers are one `Ensemble`.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from open_clip.model import get_model_preprocess_cfg
from open_clip.transform import PreprocessCfg
from torch import Tensor

from simplclip import models, retrieval
from simplclip.common import hardware, ranks
from simplclip.common.errors import InputError
from simplclip.data import held_out
from simplclip.data.decode import size_of
from simplclip.data.epoch import seeded
from simplclip.data.pack import local_shards
from simplclip.data.pairs import parts_of
from simplclip.data.rewrite import rewrite
from simplclip.data.shards import Pair, check_count
from simplclip.data.sidecars import TEACHER, VIEWS, Folders
from simplclip.data.transforms import ImageTransform, View, augmentation, stack
from simplclip.evaluation.encoder import Encoder, load
from simplclip.train import config as configs
from simplclip.train.state import image_transform

DTYPES = ("fp16", "bf16")


@dataclass
class Views:
    """The views of each image that a teacher sees: `number` views, drawn from the augmentation of a student's transform."""

    transform: ImageTransform
    number: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("views", self.number, 1)
        if augmentation(self.transform) == "none":
            raise InputError("views: expected a transform that augments, got one without, whose views are all equal")

    def draw(self, sample: Pair) -> list[View]:
        """Draws the views of a sample's image. A view depends on the seed, the shard's name, the key and its number only."""
        height, width = size_of(sample.encoded, self.transform.max_pixels)
        views = []
        for view in range(self.number):
            with seeded(self.seed, "view", sample.place, view):
                views.append(self.transform.draw(height, width))
        return views

    def stamp(self) -> dict[str, Any]:
        return {"number": self.number, "augment": augmentation(self.transform), "seed": self.seed}


@dataclass
class Ensemble:
    """Several teachers as one, whose logits are the mean of theirs: its features are those of the teachers side by side.

    Teacher i of T has the logits s_i <x_i, y_i>, with its logit scale s_i and unit vectors x_i of an image and y_i of a text.
    The features are x = [w_1 x_1, ..., w_T x_T] with w_i = sqrt(s_i / (s_1 + ... + s_T)), and y likewise. They are unit
    vectors, and with the scale s = (s_1 + ... + s_T) / T the logits s <x, y> are the mean of the teachers' logits.
    """

    encoders: Sequence[Encoder]

    @property
    def name(self) -> str:
        return " + ".join(encoder.name for encoder in self.encoders)

    @property
    def width(self) -> int:
        return sum(encoder.width for encoder in self.encoders)

    @property
    def logit_scale(self) -> float:
        return sum(encoder.logit_scale for encoder in self.encoders) / len(self.encoders)

    def stamp(self) -> dict[str, Any]:
        """Returns the description of the teachers that is stored with their features."""
        stamps = [encoder.stamp() for encoder in self.encoders]
        if len(stamps) == 1:
            return stamps[0]
        return {"name": self.name, "width": self.width, "logit_scale": self.logit_scale, "teachers": stamps}

    def encode_image(self, samples: Sequence[Pair]) -> Tensor:
        """Features float32 [N, width] of the images of N samples, not augmented."""
        images = [sample.image for sample in samples]
        return self._joined(lambda encoder: encoder.encode_image(images, len(images)))

    def encode_views(self, samples: Sequence[Pair], views: Sequence[View]) -> Tensor:
        """Features float32 [N, width] of a view of each image. Each teacher gets the pixels of the view at its own size.

        Raises InputError for a teacher whose transform is not known by size, mean and standard deviation.
        """
        colour = torch.tensor([view["colour"] for view in views]) if "colour" in views[0] else None

        def encode(encoder: Encoder) -> Tensor:
            transform = transform_of(encoder)
            pixels = stack([transform.apply(sample.encoded, view) for sample, view in zip(samples, views)])
            return encoder.features("image", transform.finish(pixels.to(encoder.device), colour))

        return self._joined(encode)

    def encode_text(self, texts: Sequence[str], batch_size: int) -> Tensor:
        """Features float32 [N, width] of N texts; equal texts are encoded once."""
        return self._joined(lambda encoder: encoder.encode_text(texts, batch_size))

    def _joined(self, encode: Callable[[Encoder], Tensor]) -> Tensor:
        total = self.logit_scale * len(self.encoders)
        return torch.cat([math.sqrt(e.logit_scale / total) * encode(e).cpu() for e in self.encoders], 1)


def transform_of(encoder: Encoder) -> ImageTransform:
    """Returns the transform that makes the pixels of a view for an encoder: its size and normalisation are the encoder's."""
    if isinstance(encoder.preprocess, ImageTransform):
        return encoder.preprocess
    try:
        return ImageTransform(PreprocessCfg(**get_model_preprocess_cfg(encoder.model)))
    except AttributeError:
        raise InputError(
            f"views: expected a teacher whose preprocessing is an ImageTransform or open_clip's, got {encoder.name} with "
            f"{encoder.preprocess!r}"
        ) from None


def write(
    shards: Any,
    out: str | os.PathLike,
    teacher: Encoder | Sequence[Encoder],
    *,
    views: Views | None = None,
    dtype: str = "fp16",
    sidecars: Folders = (),
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes a sidecar of each shard to the folder `out`: a teacher.npy for each sample, and the teacher in meta.json.

    shards: what `data.parts_of` takes. Data other than local tars are first copied into shards, see `data.pack.local_shards`.

    teacher.npy is [1 + C, D̂] with normalised rows: the image's features, then those of its C captions in the order of
    `shards.captions_of`. With k `views` it is [k + C, D̂], and views.json has the views, which `make_loader` replays. It is
    float16, or with dtype "bf16" bfloat16 stored as uint16, since numpy has no bfloat16. Several teachers are an `Ensemble`.

    sidecars: folders that are joined to the shards first, e.g. with captions of `simplclip caption`.
    batch_size: number of samples, views or captions that are encoded at a time.

    See `data.rewrite.rewrite` for errors, continuation after a crash and the returned dict.
    """
    _check_dtype(dtype)
    teachers = Ensemble([teacher] if isinstance(teacher, Encoder) else list(teacher))

    def process(samples: list[Pair]) -> list[dict[str, bytes]]:
        files: list[dict[str, bytes]] = [{} for _ in samples]
        if views is None:
            images = teachers.encode_image(samples)[:, None]
        else:
            drawn = [views.draw(sample) for sample in samples]
            images = torch.stack([teachers.encode_views(samples, one) for one in zip(*drawn)], 1)
            files = [{VIEWS: json.dumps(of_one).encode()} for of_one in drawn]
        captions = [sample.captions for sample in samples]
        texts = teachers.encode_text([text for several in captions for text in several], batch_size)
        rows = zip(images, texts.split([len(several) for several in captions]), strict=True)
        return [{TEACHER: _npy(torch.cat(parts), dtype), **others} for parts, others in zip(rows, files)]

    about = teachers.stamp() | {"dtype": dtype} | ({} if views is None else {"views": views.stamp()})
    options = {"batch_size": batch_size, "progress": progress, "title": "teacher"}
    shards = ranks.on_first(partial(local_shards, shards, out, progress=progress))
    return rewrite(shards, out, process, stamp={"teacher": about}, sidecar=True, sidecars=sidecars, **options)


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise InputError(f"dtype: expected {' or '.join(DTYPES)}, got {dtype!r}")


def _npy(rows: Tensor, dtype: str) -> bytes:
    file = io.BytesIO()
    array = rows.half().numpy() if dtype == "fp16" else rows.bfloat16().view(torch.uint16).numpy()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def student_transform(config: str | None = None, model: str | None = None, augment: str | None = None) -> ImageTransform:
    """Returns a student's training transform: that of a config (file or name), or of a model and an augmentation.

    With neither it is `augment`, by default open_clip's own. augment: as data.augment, a mapping as YAML. Raises InputError
    for an augmentation whose draws cannot be stored, such as timm's.
    """
    fields = configs.parse_yaml(augment, "augment") if augment else None
    if config is not None:
        if model is not None or augment is not None:
            raise InputError("config: expected no model and no augment beside it, which it names")
        found = image_transform(configs.load(config, ()))
    elif model is not None:
        found = models.transforms(model, train=True, augment=fields)
    else:
        found = ImageTransform(PreprocessCfg(), None if fields == "none" else fields or {})
    if not isinstance(found, ImageTransform):
        raise InputError(f"augment: expected one whose draws can be stored (without use_timm), got {found!r}")
    return found


def evaluate(
    teacher: Encoder, splits: Mapping[str, str | list[str]], *, batch_size: int = 64
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Measures a teacher's retrieval on splits (name -> shards); returns the results of `retrieval.recall_of` by name."""
    figures = {}
    for name, shards in splits.items():
        split = retrieval.Split(held_out(shards), teacher.tokenizer, teacher.preprocess)
        retrieval.encode(teacher.model, split, batch_size, teacher.device, teacher.precision, who=teacher.name)
        figures[name] = ranks.on_first(partial(retrieval.recall_of, split, teacher.device)) or {}
    return figures


def run(
    shards: Any,
    out: str | os.PathLike,
    *,
    name: str | Sequence[str],
    checkpoint: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    splits: Mapping[str, str] | None = None,
    views: Views | None = None,
    dtype: str = "fp16",
    sidecars: Folders = (),
    batch_size: int = 64,
    device: str = "auto",
    precision: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Writes a teacher's features of `shards` to `out`; returns the summary of `write` with "teacher" and "figures".

    name, checkpoint: of a teacher, see `simplclip.load`; or of several teachers, with a checkpoint for each or none.
    splits: name -> shards on which the teacher's retrieval is measured, or that of each of several teachers.
    views, dtype, sidecars, batch_size: see `write`.
    """
    names = [name] if isinstance(name, str) else list(name)
    checkpoints = list(checkpoint) if isinstance(checkpoint, (list, tuple)) else [checkpoint] * (checkpoint is not None)
    if len(checkpoints) not in (0, len(names)):
        raise InputError(f"checkpoint: expected one for each of {len(names)} teachers or none, got {len(checkpoints)}")
    _check_dtype(dtype)
    parts_of(shards)  # raises InputError before the work begins
    for split in (splits or {}).values():
        held_out(split)
    place = ranks.device(device)
    precision, _ = hardware.pick_precision(precision, place)
    say = print if progress and ranks.first() else lambda line: None
    encoders = []
    for source, weights in zip(names, checkpoints or [None] * len(names)):
        encoders.append(load(source, weights, device=place, precision=precision))
    options = {"views": views, "dtype": dtype, "sidecars": sidecars, "batch_size": batch_size, "progress": progress}
    summary = write(shards, out, encoders, **options)
    about = Ensemble(encoders).stamp()
    seen = "" if views is None else f" of {views.number} views of each image"
    what = f"features of {about['name']}{seen}, width {about['width']}"
    say(f"wrote {summary['path']}: {summary['samples']} samples with {what}")
    figures = {}
    for encoder in encoders:
        whose = "" if len(encoders) == 1 else f" ({encoder.name})"
        for split, directions in evaluate(encoder, splits or {}, batch_size=batch_size).items():
            figures[split + whose] = directions
            shown = (f"{d.replace('_', ' ')} R@1 {found['R@1']['value']:.1%}" for d, found in directions.items())
            say(f"{split}{whose}: {', '.join(shown)}")
    return summary | {"teacher": about, "figures": figures}
