"""A trained model that encodes images and texts, from any of the sources that `load` knows."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import get_model_preprocess_cfg, get_model_tokenize_cfg, set_model_preprocess_cfg
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from simplclip import models
from simplclip.common import hardware
from simplclip.common.errors import InputError
from simplclip.data.broken import BrokenSample
from simplclip.data.decode import decode_pil, rgb
from simplclip.data.shards import file_bytes
from simplclip.data.text import json_of
from simplclip.models.crop import crop_texts
from simplclip.models.mobileclip import where_to_get
from simplclip.models.registry import WeightsError
from simplclip.models.simplify import count_parameters
from simplclip.models.weight_files import check_archive, first_line, read_weights, refusal
from simplclip.retrieval import features_of
from simplclip.train.checkpoint import CheckpointError
from simplclip.train.settings import Config
from simplclip.train.state import load_model
from simplclip.train.trust import check_options

EXPORT = "export.json"  # describes the folder of `simplclip export`
_FILES = (".pt", ".pth", ".bin", ".safetensors")

Picture = str | os.PathLike | Image.Image | Tensor  # a path, a PIL image, or float [3, S, S], uint8 [3, H, W]


@dataclass
class Encoder:
    """A frozen model with its image transform and tokenizer. Features are float32 [N, width], L2-normalised, on `device`."""

    name: str  # of the model: "siclip-tiny", "open_clip:ViT-B-32"
    model: nn.Module  # encode_image and encode_text with open_clip's signatures, and logit_scale (a logarithm)
    preprocess: Callable[[Image.Image], Tensor]  # RGB -> float32 [3, S, S]
    tokenizer: Callable[[list[str]], Tensor]  # texts -> int64 [N, L]
    device: torch.device
    precision: str  # "fp32", "bf16" or "fp16"
    source: str = ""  # the argument of `load`
    config: Config | None = None  # of the run, if the source is a checkpoint
    step: int | None = None  # of the run

    def __post_init__(self) -> None:
        self.model.to(self.device).eval().requires_grad_(False)
        with suppress(InputError):  # texts that cannot be cropped stay as they are
            crop_texts(self.model)
        self.width = self.encode_text(["a"]).shape[1]

    def __repr__(self) -> str:
        counts, length = count_parameters(self.model), self.tokenizer(["a"]).shape[1]
        height, width = self.preprocess(Image.new("RGB", (8, 8))).shape[1:]
        parts = ", ".join(f"{part} {count:,}" for part, count in counts.items() if count)
        step = "" if self.step is None else f", step {self.step:,}"
        return (
            f"{self.name} from {self.source}{step}\n"
            f"  parameters: {parts}\n"
            f"  images: {height} x {width} pixels; texts: {length} tokens\n"
            f"  features: {self.width} numbers, computed in {self.precision} on {self.device}\n"
            f"  similarities: cosines times {self.logit_scale:.4g}"
        )

    @property
    def logit_scale(self) -> float:
        """The factor of similarities that the model was trained with."""
        scale: Any = self.model.logit_scale
        return scale.exp().item()

    def fingerprint(self) -> str:
        """A hash of the weights and the image transform, equal for equal encoders."""
        transform = re.sub(r" at 0x\w+", "", repr(self.preprocess))  # without the addresses of functions
        digest = hashlib.sha256(transform.encode())
        for key, value in self.model.state_dict().items():
            digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def stamp(self) -> dict[str, Any]:
        """Returns the description of this encoder that files of its features contain."""
        about = {"name": self.name, "width": self.width, "logit_scale": self.logit_scale}
        return about | {"weights": self.fingerprint(), "precision": self.precision}

    def encode_image(self, images: Picture | Sequence[Picture], batch_size: int = 64) -> Tensor:
        """Returns features float32 [N, width] of N images.

        images: paths, PIL images, or tensors: preprocessed float [3, S, S], or uint8 [3, H, W]; a single image (N = 1), a
            list of images, or a tensor [N, 3, ...]. Transparent images are composed on white, as in shards.
        batch_size: images that are decoded and encoded at a time.

        Raises: FileNotFoundError; InputError for a file that is not an image, a tensor of another shape, or features that are
        not finite.
        """
        if isinstance(images, (str, os.PathLike, Image.Image)) or (isinstance(images, Tensor) and images.ndim == 3):
            images = [images]
        parts = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
        batches = (torch.stack([self._pixels(image) for image in part]) for part in parts)
        return self._joined([self.features("image", batch) for batch in batches])

    def encode_text(self, texts: str | Sequence[str], batch_size: int = 256) -> Tensor:
        """Returns features float32 [N, width] of a text (N = 1) or of N texts. Raises InputError if a feature is not finite.

        Each different text is encoded once, together with texts of similar length. batch_size: texts at a time.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        different = sorted(set(texts), key=lambda text: (len(text), text))
        parts = [different[i : i + batch_size] for i in range(0, len(different), batch_size)]
        place = {text: i for i, text in enumerate(different)}
        features = self._joined([self.features("text", self.tokenizer(part)) for part in parts])
        return features[[place[text] for text in texts]]

    def features(self, tower: str, inputs: Tensor) -> Tensor:
        """Features float32 [N, width] of preprocessed images [N, 3, S, S] (tower "image") or token ids [N, L] ("text")."""
        return features_of(self.model, tower, inputs, self.device, self.precision, self.source or self.name)

    def _joined(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts) if parts else torch.empty(0, self.width, device=self.device)

    def _pixels(self, image: Picture) -> Tensor:
        if isinstance(image, Tensor):
            if image.ndim != 3 or len(image) != 3:
                raise InputError(f"images: expected tensors [3, S, S] or [N, 3, S, S], got one of {list(image.shape)}")
            return self.preprocess(to_pil_image(image)) if image.dtype == torch.uint8 else image.float()
        if isinstance(image, Image.Image):
            return self.preprocess(rgb(image))
        if not isinstance(image, (str, os.PathLike)):
            raise InputError(f"images: expected paths, PIL images or tensors, got {type(image).__name__}")
        try:
            return self.preprocess(decode_pil(file_bytes(image)))
        except BrokenSample as broken:
            raise InputError(f"images: expected an image, got {image}: {broken.args[0]} ({broken.args[1]})") from None


def load(
    source: str | os.PathLike,
    checkpoint: str | os.PathLike | None = None,
    *,
    device: str | torch.device = "auto",
    precision: str = "fp32",
    trust: bool = False,
) -> Encoder:
    """Loads the encoder that `source` names:

    PATH                        a checkpoint of `simplclip train` or the folder of a run (its last.pt), or the folder of
                                `simplclip export` with weights for torch
    open_clip:NAME/TAG          open_clip's pretrained weights, which it downloads if necessary; with `checkpoint` only the
                                tag's preprocessing is used, and nothing is downloaded
    open_clip:NAME/PATH         weights of that model in a file, .pt or .safetensors
    open_clip:NAME              with `checkpoint`: a file of weights as above
    siclip-tiny, ...            with `checkpoint`: a checkpoint of `simplclip train`, the folder of a run, or a file of the
                                model's weights, for mobileclip-s0 also the published file. siclip-tiny/PATH means the same

    Without a tag, an open_clip model with a single known tag gets the preprocessing of this tag.

    device: cpu, cuda, cuda:1 ..., or auto: a GPU if there is one.
    precision: fp32, bf16, fp16, or auto: bf16 if the device has it. Features are float32 in each of them.
    trust: accept model options of a checkpoint or an export that may fetch or unpickle further files, see `train.trust`.

    Raises: ValueError if the source is unknown or has no weights, FileNotFoundError, CheckpointError if a file is not a
    checkpoint of that model.
    """
    source, place = os.fspath(source), hardware.pick_device(str(device))
    precision, _ = hardware.pick_precision(precision, place)
    name, _, rest = source.partition("/")
    if checkpoint is not None and not Path(checkpoint).exists():
        raise _missing(checkpoint)
    if source.startswith(models.PLAIN):
        plain, _, tag = source.removeprefix(models.PLAIN).partition("/")
        found = _open_clip(plain, tag, checkpoint)
    elif checkpoint is None and Path(source).exists():
        found = _from_run_or_export(Path(source), trust)
    elif name in models.names() and not (rest and checkpoint):
        found = _named(name, checkpoint or rest, trust)
    elif source.endswith(_FILES) or (rest and checkpoint is None):
        raise _missing(source)
    else:
        known = ", ".join((*models.names(), f"{models.PLAIN}NAME", f"{models.PLAIN}NAME/TAG"))
        raise InputError(f"source: expected a checkpoint, the folder of a run or an export, or {known}, got {source!r}")
    return Encoder(**found, device=place, precision=precision, source=source)


def _missing(path: str | os.PathLike) -> FileNotFoundError:
    return FileNotFoundError(f"checkpoint: no such file: {path}{where_to_get(path)}")


def _named(name: str, weights: str | os.PathLike, trust: bool) -> dict[str, Any]:
    if not weights:
        raise InputError(f"checkpoint: expected a file with the weights of {name!r}, got none{where_to_get(name)}")
    path = Path(weights)
    if not path.exists():
        raise _missing(path)
    bare = path.is_file() and "format" not in read_weights(path, CheckpointError, "checkpoint: expected weights")
    if not bare:
        found = _from_run_or_export(path, trust)
        if found["name"] != name:
            raise CheckpointError(f"{path}: expected a checkpoint of {name!r}, got one of {found['name']!r}")
        return found
    try:
        model = models.create(name, checkpoint=path)
    except (InputError, WeightsError) as error:
        raise CheckpointError(str(error)) from None
    return _parts(name, model)


def _parts(name: str, model: Any) -> dict[str, Any]:
    """Arguments of `Encoder` for a model of this library, whose image size and context length may differ from its default."""
    transform = models.transforms(name, train=False, image_size=model.visual.image_size)
    tokenizer = models.tokenizer(name, get_model_tokenize_cfg(model).get("context_length"))
    return {"name": name, "model": model, "preprocess": transform, "tokenizer": tokenizer}


def _from_run_or_export(path: Path, trust: bool) -> dict[str, Any]:
    """Arguments of `Encoder` for a run's checkpoint or an export."""
    if (path / EXPORT).is_file() and not (path / "last.pt").exists():
        return _exported(path, trust)
    model, config, state = load_model(path, trust=trust)
    name = config.model.name
    return _parts(name, model) | {"config": config, "step": state["step"]}


def _exported(folder: Path, trust: bool) -> dict[str, Any]:
    try:
        about = json_of((folder / EXPORT).read_text("utf-8"))
        name, options, step = about["model"], dict(about["options"]), int(about["step"])
        options.pop("checkpoint", None)
        weights = [Path(file).name for end in (".safetensors", ".pt") for file in about["files"] if file.endswith(end)]
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
        raise CheckpointError(f"{folder / EXPORT}: expected a file of simplclip export, got another one") from None
    if not weights:
        raise CheckpointError(
            f"{folder}: expected an export with weights (--format open_clip), got {', '.join(about['files'])}"
        )
    if not trust:
        check_options(options, str(folder / EXPORT))
    model = models.create(name, checkpoint=folder / weights[0], **options)
    return _parts(name, model) | {"step": step}


def _open_clip(plain: str, tag: str, checkpoint: str | os.PathLike | None) -> dict[str, Any]:
    """Arguments of `Encoder` for a model of open_clip. tag: a tag of open_clip, a file of weights, or an empty string."""
    name = models.PLAIN + plain
    if plain not in open_clip.list_models():
        models.tokenizer(name)  # raises an error that lists the nearest names
    tags = open_clip.list_pretrained_tags_by_model(plain)
    if tag and tag not in tags and checkpoint is None and (tag.endswith(_FILES) or Path(tag).is_file()):
        checkpoint, tag = tag, ""
        if not Path(checkpoint).exists():
            raise _missing(checkpoint)
    if tag and tag not in tags:
        raise InputError(f"source: expected a tag of {plain}, one of {', '.join(tags) or 'none'}, or a file, got {tag!r}")
    named = f"{name}/{tag}" if tag else name
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
            raise InputError(f"source: open_clip could not get {named}: {reason}; or give its file by --checkpoint") from None
    else:
        model = models.create(name)
        try:
            check_archive(checkpoint)
            open_clip.load_checkpoint(model, str(checkpoint), strict=True, weights_only=True)
        except ModuleNotFoundError:
            raise
        except Exception as error:  # the type depends on the file: pickle, zip, safetensors, shapes and names
            reason = refusal(error) or " ".join(str(error).split())[:300] or type(error).__name__
            raise CheckpointError(
                f"{checkpoint}: expected a checkpoint of open_clip's {plain}, got another file: {reason}"
            ) from None
        if tag or len(tags) == 1:
            theirs = open_clip.get_pretrained_cfg(plain, tag or tags[0]) | {"size": None}  # None keeps the model's size
            set_model_preprocess_cfg(model, merge_preprocess_dict(get_model_preprocess_cfg(model), theirs))
    transform = image_transform_v2(PreprocessCfg(**get_model_preprocess_cfg(model)), is_train=False)
    return {"name": named, "model": model, "preprocess": transform, "tokenizer": open_clip.get_tokenizer(plain)}
