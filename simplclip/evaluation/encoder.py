"""A trained model that encodes images and texts, from any source that `load` takes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from simplclip.common import hardware
from simplclip.common.errors import InputError
from simplclip.data.errors import BrokenSample
from simplclip.data.images import decode_pil
from simplclip.data.samples import file_bytes
from simplclip.models.crop import crop_texts
from simplclip.models.trained import load_source
from simplclip.models.weights import parse_source

# a path, a PIL image, or float [3, S, S], uint8 [3, H, W]
Picture = str | os.PathLike | Image.Image | Tensor


@dataclass
class Encoder:
    """A model with its image transform and tokenizer; `load` makes it of trained weights.

    Features are float32 [N, width], L2-normalised, on `device`.
    """

    name: str  # of the model: "siclip-tiny", "open_clip:ViT-B-32"
    # encode_image and encode_text with open_clip's signatures, and logit_scale (a logarithm)
    model: nn.Module
    preprocess: Callable[[Image.Image], Tensor]  # -> float32 [3, S, S]
    tokenizer: Callable[[list[str]], Tensor]  # texts -> int64 [N, L]
    device: torch.device  # of the model
    precision: str  # "fp32", "bf16" or "fp16"
    source: str = ""  # the argument of `load`
    config: dict[str, Any] | None = None  # of the run, if the source is a checkpoint
    step: int | None = None  # of the run

    def __repr__(self) -> str:
        return (
            f"{self.name} from {self.source}: features of {self.width} numbers, in "
            f"{self.precision} on {self.device}"
        )

    @cached_property
    def width(self) -> int:
        """The number of features, D."""
        return self.encode_text(["a"]).shape[1]

    @property
    def logit_scale(self) -> float:
        """The factor of similarities that the model was trained with."""
        scale: Any = self.model.logit_scale
        return scale.exp().item()

    def fingerprint(self) -> str:
        """Returns a hash, 16 hex digits, of the weights and the image transform.

        It is equal for equal encoders, in any process and on any device.
        """
        addresses = r" at 0x\w+"  # of functions, which differ between processes
        transform = re.sub(addresses, "", repr(self.preprocess))
        digest = hashlib.sha256(transform.encode())
        for key, value in self.model.state_dict().items():
            digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def stamp(self) -> dict[str, Any]:
        """Returns what files of this encoder's features say of it; "weights": the fingerprint."""
        return {
            "name": self.name,
            "width": self.width,
            "logit_scale": self.logit_scale,
            "weights": self.fingerprint(),
            "precision": self.precision,
        }

    def encode_image(self, images: Picture | Sequence[Picture], batch_size: int = 64) -> Tensor:
        """Returns features float32 [N, width] of N images.

        images: paths, PIL images, or tensors: preprocessed float [3, S, S], or uint8 [3, H, W]; a
        single image (N = 1), a list of images, or a tensor [N, 3, ...]. They are decoded and
        encoded `batch_size` at a time.
        Raises OSError for a file that cannot be read; InputError for one that is not an image, a
        tensor of another shape, or features that are not finite; TypeError.
        """
        if isinstance(images, Tensor):
            images = images[None] if images.ndim == 3 else images
        elif isinstance(images, (str, os.PathLike, Image.Image)):
            images = [images]
        features = []
        for start in range(0, len(images), batch_size):
            batch = [self._pixels(image) for image in images[start : start + batch_size]]
            features.append(self.features("image", torch.stack(batch)))
        return self._joined(features)

    def encode_text(self, texts: str | Sequence[str], batch_size: int = 256) -> Tensor:
        """Returns features float32 [N, width] of a text (N = 1) or of N texts.

        Each different text is encoded once, together with texts of similar length, `batch_size` at
        a time. Raises InputError if a feature is not finite.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        different = sorted(set(texts), key=lambda text: (len(text), text))
        features = []
        for start in range(0, len(different), batch_size):
            tokens = self.tokenizer(different[start : start + batch_size])
            features.append(self.features("text", tokens))
        rows = {text: row for row, text in enumerate(different)}
        return self._joined(features)[[rows[text] for text in texts]]

    @torch.no_grad()
    def features(self, tower: str, inputs: Tensor) -> Tensor:
        """Returns features float32 [N, width], L2-normalised, of inputs of one tower.

        tower: "image", for preprocessed images [N, 3, S, S], or "text", for token ids [N, L]; they
        are moved to the device. Raises InputError if a feature is not finite.
        """
        encode: Any = self.model.encode_image if tower == "image" else self.model.encode_text
        with hardware.autocast(self.precision, self.device):
            features = encode(inputs.to(self.device, non_blocking=True), normalize=True).float()
        if not features.isfinite().all():
            raise InputError(
                f"{self.source or self.name}: expected finite features, got {tower} features that "
                f"are not finite in {self.precision}"
            )
        return nn.functional.normalize(features, dim=-1)

    def _joined(self, features: list[Tensor]) -> Tensor:
        """Returns the features of batches as one tensor [N, width]; [0, width] of none."""
        if not features:
            return torch.empty(0, self.width, device=self.device)
        return torch.cat(features)

    def _pixels(self, image: Picture) -> Tensor:
        """Returns one image as the model takes it, float32 [3, S, S]; errors of `encode_image`."""
        if isinstance(image, Tensor):
            if image.ndim != 3 or len(image) != 3:
                raise InputError(
                    "images: expected tensors [3, S, S] or [N, 3, S, S], got one of "
                    f"{list(image.shape)}"
                )
            if image.dtype == torch.uint8:
                return self.preprocess(to_pil_image(image))
            return image.float()
        try:
            content = image if isinstance(image, Image.Image) else file_bytes(os.fspath(image))
            return self.preprocess(decode_pil(content))
        except BrokenSample as broken:
            raise InputError(
                f"images: expected an image, got {image}: {broken.reason} ({broken.detail})"
            ) from None


def load(
    source: str | os.PathLike,
    checkpoint: str | os.PathLike | None = None,
    *,
    last: bool = False,
    device: str | torch.device = "auto",
    precision: str = "fp32",
) -> Encoder:
    """Loads the encoder that `source` names, frozen and in eval mode, and moves it to the device.

    source, checkpoint: a run, a checkpoint, an export, or a model's name with weights, see
    `models.trained.load_source`. open_clip may download its weights.
    last: of a run's folder take last.pt; else best.pt, if there is one.
    device: cpu, cuda, cuda:1 ..., or auto: a GPU if there is one.
    precision: fp32, bf16, fp16, or auto: bf16 if the device has it, else fp32. Features are float32
    in each of them.

    Raises: InputError if the source is unknown, FileNotFoundError, CheckpointError if a file is not
    a checkpoint of that model.
    """
    device = hardware.pick_device(str(device))
    precision, _ = hardware.pick_precision(precision, device)
    parsed = parse_source(source, checkpoint, last=last)
    encoder = Encoder(
        **load_source(parsed), device=device, precision=precision, source=parsed.label
    )
    encoder.model.to(device).eval().requires_grad_(False)
    # texts that cannot be cropped are computed with their padding
    with contextlib.suppress(InputError):
        crop_texts(encoder.model)
    return encoder
