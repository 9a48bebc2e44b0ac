"""Held-out splits as a model reads them, and the model's towers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from simplclip.common import hardware
from simplclip.common.errors import InputError, UserError
from simplclip.data import HeldOut, held_out
from simplclip.data.errors import BrokenSample, Skipped
from simplclip.data.transforms import ImageTransform, Transform, to_tensor

LEAST_SAMPLES = 2  # of a run's held-out data: of one, R@1 is 100 % with any weights

Tokenizer = Callable[[list[str]], Tensor]  # texts -> int64 [N, L]


@dataclass(frozen=True)
class Split:
    """Held-out data, and the functions that make a model's inputs of them."""

    data: HeldOut
    tokenizer: Tokenizer
    transform: Transform

    def pictures(self, positions: Iterable[int]) -> dict[int, Image.Image]:
        """Returns the RGB images at these positions in the data, cropped as the model sees them.

        The data are read again, up to the last of them.
        """
        images = self.data.pictures(positions)
        return {position: cropped(self.transform, image) for position, image in images.items()}


def cropped(transform: Transform, image: Image.Image) -> Image.Image:
    """Returns the part of an image that a model sees, as a PIL image to look at.

    transform: the model's. Of an ImageTransform the picture has the smallest multiple of the
    model's size with at least 160 pixels a side; of others, and of a very long image, it has the
    model's size. A transform without steps leaves the image whole.
    """
    if isinstance(transform, ImageTransform):
        larger = copy.copy(transform)
        factor = max(1, -(-160 // min(transform.size)))
        larger.size = (factor * transform.size[0], factor * transform.size[1])
        try:
            pixels = larger.apply_decoded(to_tensor(image), {})
        except BrokenSample:  # before it is cropped, the image would have too many pixels
            pixels = transform.apply_decoded(to_tensor(image), {})
        return to_pil_image(pixels)
    # the steps of a transform of open_clip, up to the conversion to a tensor
    for step in getattr(transform, "transforms", ()):
        changed = step(image)
        if not isinstance(changed, Image.Image):
            break
        image = changed
    return image


def load_splits(
    splits: Mapping[str, Any], tokenizer: Tokenizer, transform: Transform
) -> dict[str, Split]:
    """Returns the eval.splits of a run whose model has this tokenizer and image transform.

    splits: name -> data as `data.held_out` takes them. The result has the same names. The
    first samples of each are read as a check.
    Raises InputError, which names the split's key, for data that `data.held_out` rejects or that
    have less than LEAST_SAMPLES usable samples.
    """
    loaded = {
        name: Split(held_out(source, name=f"eval.splits.{name}"), tokenizer, transform)
        for name, source in splits.items()
    }
    for name, split in loaded.items():
        samples, skipped = 0, Skipped()
        try:
            for batch in split.data.batches(transform, 1):
                skipped.merge(batch.skipped)
                samples += len(batch.rows)
                if samples == LEAST_SAMPLES:
                    break
        except UserError as error:
            raise InputError(f"eval.splits.{name}: {error}") from None
        if samples < LEAST_SAMPLES:
            raise InputError(
                f"eval.splits.{name}: expected at least {LEAST_SAMPLES} usable samples, got "
                f"{samples}; {skipped}"
            )
    return loaded


@dataclass(frozen=True)
class Towers:
    """The towers of a model, which encode images and texts on a device in a precision."""

    model: nn.Module
    device: torch.device
    precision: str  # "fp32", "bf16" or "fp16"
    source: str = "checkpoint"  # of the model, for errors

    @torch.no_grad()
    def features(self, tower: str, inputs: Tensor) -> Tensor:
        """Returns features float32 [N, D], L2-normalised, of inputs of one tower.

        tower: "image", for images [N, 3, S, S], or "text", for token ids [N, L]; they are moved to
        the device.
        Raises InputError, which names the source, if a feature is not finite.
        """
        encode: Any = self.model.encode_image if tower == "image" else self.model.encode_text
        with hardware.autocast(self.precision, self.device):
            features = encode(inputs.to(self.device, non_blocking=True), normalize=True).float()
        if not features.isfinite().all():
            raise InputError(
                f"{self.source}: expected finite features, got {tower} features that are not "
                f"finite in {self.precision}"
            )
        return nn.functional.normalize(features, dim=-1)
