"""Teachers by name: "builtin", "open_clip:NAME", "open_clip:NAME/TAG", or a SiCLIP of this library."""

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import set_model_preprocess_cfg
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image
from torch import Tensor, nn

from simplclip import models
from simplclip.common import hardware, plugins
from simplclip.common.errors import InputError
from simplclip.models.registry import first_line
from simplclip.train.checkpoint import CheckpointError
from simplclip.train.state import load_model

BUILTIN = "builtin"


@dataclass
class Teacher:
    """A frozen model with its transform and tokenizer. Features are float32 [N, width], L2-normalised."""

    name: str
    model: nn.Module  # encode_image and encode_text with open_clip's signatures, and logit_scale (a logarithm)
    transform: Callable[[Image.Image], Tensor]  # RGB -> float32 [3, S, S]
    tokenizer: Callable[[list[str]], Tensor]  # texts -> int64 [N, L]
    device: torch.device
    precision: str  # "fp32", "bf16" or "fp16"

    def __post_init__(self) -> None:
        self.model.to(self.device).eval().requires_grad_(False)
        with torch.no_grad():
            self.width = self.encode_text(["a"]).shape[1]

    def fingerprint(self) -> str:
        """A hash of the weights and the image transform, equal for equal teachers."""
        digest = hashlib.sha256(re.sub(r" at 0x\w+", "", repr(self.transform)).encode())  # without the addresses of functions
        for key, value in self.model.state_dict().items():
            digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def stamp(self) -> dict[str, Any]:
        """The entry of meta.json for features of this teacher."""
        about = {"name": self.name, "width": self.width, "logit_scale": self.model.logit_scale.exp().item()}
        return about | {"weights": self.fingerprint(), "precision": self.precision}

    def encode_image(self, images: list[Image.Image]) -> Tensor:
        return self._features(self.model.encode_image, torch.stack([self.transform(image) for image in images]))

    def encode_text(self, texts: list[str]) -> Tensor:
        return self._features(self.model.encode_text, self.tokenizer(texts))

    @torch.no_grad()
    def _features(self, encode: Callable[..., Tensor], inputs: Tensor) -> Tensor:
        with hardware.autocast(self.precision, self.device):
            features = encode(inputs.to(self.device), normalize=True).float()
        if not features.isfinite().all():
            raise InputError(f"teacher: expected finite features, got others from {self.name} in {self.precision}")
        return nn.functional.normalize(features, dim=-1)


def load(
    name: str = BUILTIN,
    checkpoint: str | os.PathLike | None = None,
    *,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
) -> Teacher:
    """The teacher called `name`:

    builtin                     checkpoint: the heads that `simplclip teacher` saved
    open_clip:NAME              checkpoint: a state dict of that model, .pt or .safetensors
    open_clip:NAME/TAG          open_clip's pretrained weights, which it downloads if necessary; with a checkpoint only the
                                tag's preprocessing is used, and nothing is downloaded
    siclip-tiny, ...            checkpoint: one of `simplclip train`, or the folder of a run

    Without a tag, an open_clip model with a single known tag has that tag's preprocessing.
    Raises: ValueError if the name is unknown or no checkpoint is given, FileNotFoundError, CheckpointError if the file is not
    a checkpoint of that model.
    """
    place = hardware.pick_device(str(device))
    precision, _ = hardware.pick_precision(precision, place)
    if name != BUILTIN and not name.startswith(models.PLAIN) and name not in models.names():
        known = ", ".join((BUILTIN, *models.names(), f"{models.PLAIN}NAME", f"{models.PLAIN}NAME/TAG"))
        raise InputError(f"teacher: expected one of {known}, got {name!r}")
    if checkpoint is not None and not Path(checkpoint).exists():
        raise FileNotFoundError(f"checkpoint: no such file: {checkpoint}")
    if name.startswith(models.PLAIN):
        model, transform, tokenizer = _open_clip(name, checkpoint)
    elif checkpoint is None:
        raise InputError(f"checkpoint: expected a file for the teacher {name!r}, got none")
    elif name == BUILTIN:
        model, transform, tokenizer = plugins.load("teachers", name).load(checkpoint)
    else:
        model, config, _ = load_model(checkpoint)
        if config.model.name != name:
            raise CheckpointError(f"{checkpoint}: expected a checkpoint of {name!r}, got one of {config.model.name!r}")
        transform = models.transforms(name, train=False, image_size=config.model.image_size)
        tokenizer = models.tokenizer(name)
    return Teacher(name, model, transform, tokenizer, place, precision)


def _open_clip(name: str, checkpoint: str | os.PathLike | None) -> tuple[nn.Module, Any, Any]:
    plain, _, tag = name.removeprefix(models.PLAIN).partition("/")
    if plain not in open_clip.list_models():
        models.tokenizer(models.PLAIN + plain)  # raises an error that lists the nearest names
    tags = open_clip.list_pretrained_tags_by_model(plain)
    if tag and tag not in tags:
        raise InputError(f"teacher: expected a tag of {plain}, one of {', '.join(tags) or 'none'}, got {tag!r}")
    if checkpoint is None:
        if not tag:
            raise InputError(
                f"checkpoint: expected a file of weights for {name}, got none; or name a tag that open_clip downloads: "
                + (", ".join(f"{name}/{known}" for known in tags) or "it has none")
            )
        try:
            model = open_clip.create_model(plain, pretrained=tag)
        except Exception as error:  # the download may raise many types
            reason = first_line(error)
            raise InputError(f"teacher: open_clip could not get {name}: {reason}; or give its file by --checkpoint") from None
    else:
        model = models.create(models.PLAIN + plain)
        try:
            open_clip.load_checkpoint(model, str(checkpoint), strict=True, weights_only=True)
        except ModuleNotFoundError:
            raise
        except Exception as error:  # the type depends on the file: pickle, zip, safetensors, shapes and names
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise CheckpointError(
                f"{checkpoint}: expected a checkpoint of open_clip's {plain}, got another file: {reason}"
            ) from None
        if tag or len(tags) == 1:
            theirs = open_clip.get_pretrained_cfg(plain, tag or tags[0]) | {"size": None}  # None keeps the model's
            set_model_preprocess_cfg(model, merge_preprocess_dict(model.visual.preprocess_cfg, theirs))
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    return model, transform, open_clip.get_tokenizer(plain)
