"""One or several teachers whose features are stored as those of one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.model import get_model_preprocess_cfg
from open_clip.transform import PreprocessCfg
from torch import Tensor

from simplclip.common.errors import InputError
from simplclip.data.shards import Pair
from simplclip.data.transforms import ImageTransform, View, stack
from simplclip.evaluation.encoder import Encoder


@dataclass
class Ensemble:
    """The mean of several teachers' logits, as features: those of the teachers side by side.

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
        """What a file of features says about the teachers that made them."""
        stamps = [encoder.stamp() for encoder in self.encoders]
        if len(stamps) == 1:
            return stamps[0]
        return {"name": self.name, "width": self.width, "logit_scale": self.logit_scale, "teachers": stamps}

    def encode_image(self, samples: Sequence[Pair]) -> Tensor:
        """Features float32 [N, width] of the images of N samples, not augmented."""
        images = [sample.image for sample in samples]
        return self._joined(lambda encoder: encoder.encode_image(images, len(images)))

    def encode_views(self, samples: Sequence[Pair], views: Sequence[View]) -> Tensor:
        """Features float32 [N, width] of a view of each image, whose pixels are made at each teacher's size.

        Raises InputError for a teacher whose transform is not known by size, mean and standard deviation.
        """
        colour = torch.tensor([view["colour"] for view in views]) if "colour" in views[0] else None

        def encode(encoder: Encoder) -> Tensor:
            transform = transform_of(encoder)
            pixels = stack([transform.apply(sample.encoded, view) for sample, view in zip(samples, views)])
            return encoder.features("image", transform.finish(pixels.to(encoder.device), colour))

        return self._joined(encode)

    def encode_text(self, texts: Sequence[str], batch_size: int) -> Tensor:
        """Features float32 [N, width] of N texts, each different one of which is encoded once."""
        return self._joined(lambda encoder: encoder.encode_text(texts, batch_size))

    def _joined(self, encode: Callable[[Encoder], Tensor]) -> Tensor:
        total = self.logit_scale * len(self.encoders)
        return torch.cat([math.sqrt(e.logit_scale / total) * encode(e).cpu() for e in self.encoders], 1)


def transform_of(encoder: Encoder) -> ImageTransform:
    """What makes the pixels of a view for an encoder, at its size and normalised as its preprocessing does."""
    if isinstance(encoder.preprocess, ImageTransform):
        return encoder.preprocess
    try:
        return ImageTransform(PreprocessCfg(**get_model_preprocess_cfg(encoder.model)))
    except AttributeError:
        raise InputError(
            f"views: expected a teacher whose preprocessing is an ImageTransform or open_clip's, got {encoder.name} with "
            f"{encoder.preprocess!r}"
        ) from None
