"""Models by name: SiCLIPs, MobileCLIP-S0, open_clip's models; with their tokenizers and image transforms."""

import copy
import difflib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import open_clip
import torch
from open_clip.model import CustomTextCLIP, set_model_preprocess_cfg
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image
from timm.layers.helpers import to_2tuple
from torch import nn

from simplclip.common.errors import InputError
from simplclip.data.transforms import ImageTransform
from simplclip.models import mobileclip, trunks  # noqa: F401, timm finds the trunks by name
from simplclip.models.packaged import minilm_tokenizer
from simplclip.models.short_vocabulary import ShortVocabTokenizer
from simplclip.models.simplify import simplify
from simplclip.models.weights import first_line, load_exactly, read
from simplclip.nn import neighbour_groups

PLAIN = "open_clip:"
Tokenizer = Callable[[list[str]], torch.Tensor]


@dataclass(frozen=True)
class Spec:
    """The recipe of a model: an open_clip configuration, and the arguments of `simplify`, or None for a model with its own
    blocks.

    tokenizer: a function from the context length to a tokenizer; None for open_clip's own.
    build: the function that makes the model of the configuration, if open_clip does not.
    origins: name of packaged weights (packaged.SOURCES) -> the tensors that `inherit` takes from these weights: prefix in
        the weights -> prefix in this model.
    """

    original: str
    config: Mapping[str, Any]
    simplify: Mapping[str, Any] | None
    preprocess: Mapping[str, Any]
    augment: str | Mapping[str, Any]
    tokenizer: Callable[[int], Tokenizer] | None = None
    channels_last: bool = False
    build: Callable[..., nn.Module] | None = None
    origins: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


_MOBILECLIP: dict[str, Any] = {
    "preprocess": {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "interpolation": "bilinear"},
    "augment": {},
}
_MOBILECLIP_S0 = _MOBILECLIP | {
    "original": "mobileclip-s0",
    "config": {
        "embed_dim": 512,
        "vision_cfg": open_clip.get_model_config("MobileCLIP2-S0")["vision_cfg"],
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 4},
    },
    "build": mobileclip.create,
    "tokenizer": lambda length: SimpleTokenizer(context_length=length),
}


def _small(trunk: str, text: dict[str, Any], **others: Any) -> Spec:
    config = {
        "embed_dim": 256,
        "vision_cfg": {"timm_model_name": trunk, "image_size": 48},
        "text_cfg": {"context_length": 16, "layers": 2, **text},
        "custom_text": True,
    }
    original, simplify = "the same with standard blocks", {"gamma": {"text": 0.3}}
    return Spec(original, config, simplify, augment="affine", channels_last=True, **others)


_SPECS = {
    "mobileclip-s0": Spec(simplify=None, **_MOBILECLIP_S0),
    # The two blocks of the last image stage share [q|k] and have their own MLPs, which takes 14.3 % of the image encoder's
    # parameters away, as in the paper. The text blocks share nothing: each way of sharing cost recall in the demo's student.
    "siclip-s0": Spec(simplify={"share": {"image": {"attention": [[0, 1]]}}}, **_MOBILECLIP_S0),
    # The text tower carries most of MobileCLIP2-S0's parameters, and neighbouring layers of a trained CLIP text tower
    # do nearly the same; so its 12 blocks share weights in pairs. The two blocks of the last image stage do not share.
    # Masking padding lost no recall in a tower of this shape. siclip-s0 masks none: its inherited convolutions read it.
    "siclip2-s0": Spec(
        original="MobileCLIP2-S0",
        config=open_clip.get_model_config("MobileCLIP2-S0"),
        simplify={"share": {"text": neighbour_groups(12, 2)}, "mask_padding": True},
        **_MOBILECLIP,
    ),
    "siclip-tiny": _small(
        "siclip_tiny_trunk",
        {"vocab_size": 8192, "width": 256, "heads": 8},
        preprocess={},
        tokenizer=lambda length: ShortVocabTokenizer(8192, context_length=length),
    ),
    # The net and the token embeddings, which can be inherited, define both widths. A step at 48 px takes about 0.7 of the
    # time of a step at 64 px, and retrieval on the emoji loses 1 to 3 points.
    "siclip-lite0": _small(
        "siclip_lite0_trunk",
        # eos_id: [SEP]
        {"vocab_size": 30522, "width": 384, "heads": 12, "mlp_ratio": 2.0, "pool_type": "eos", "eos_id": 102},
        preprocess={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
        tokenizer=minilm_tokenizer,
        origins={
            "efficientnet-lite0": {"": "visual.trunk.patch_embed.backbone."},
            "minilm": {"embeddings.word_embeddings.": "text.token_embedding."},
        },
    ),
}


def names() -> list[str]:
    """Returns the names of MobileCLIP-S0 and this library's SiCLIPs. `create` also takes ``open_clip:NAME`` for each name of
    ``open_clip.list_models()``."""
    return list(_SPECS)


def original(name: str) -> str | None:
    """Returns the model with its own blocks behind a SiCLIP or a plain name, by its name for `create`; or None."""
    base = spec_of(name).original
    return base if base in _SPECS else PLAIN + base if base in open_clip.list_models() else None


def configuration(spec: Spec, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Returns open_clip's configuration of a model, before it is simplified. overrides: as for `create`."""
    config = copy.deepcopy(dict(spec.config))
    for key, value in overrides.items():
        config[key] = {**config.get(key, {}), **value} if key in ("vision_cfg", "text_cfg") else value
    config["vision_cfg"]["timm_model_pretrained"] = False
    return config


def create(
    name: str | Spec,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    simplified: bool = True,
    simplify_options: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> nn.Module:
    """Builds a model with random weights, or with the weights of a local checkpoint. Nothing is downloaded.

    Args:
        name: one of `names`, or ``open_clip:NAME`` for the plain open_clip model; or a `Spec`.
        checkpoint: a file of weights as for `inherit`, which must fit exactly.
        device: device of the model.
        simplified: False for the model that a SiCLIP is made from, with its own blocks.
        simplify_options: arguments of `simplify` that replace those of the name. If they are given, even as {}, a model that
            is no SiCLIP is simplified too.
        overrides: open_clip's model arguments. ``vision_cfg`` and ``text_cfg`` are merged into those of the name,
            others (``embed_dim``, ``init_logit_scale``, ``output_dict``...) replace them.

    Returns:
        An open_clip model. It has the attribute ``origins``, see `Spec`; if it was simplified also ``simplify_report``, a
        report of the replaced blocks.

    Raises:
        InputError: the name is unknown; the message lists the nearest names.
        CheckpointError: the checkpoint has no weights, or others.
    """
    state = None if checkpoint is None else read(checkpoint, "checkpoint")  # before the model, which may take long
    spec = spec_of(name) if isinstance(name, str) else name
    if simplify_options and not simplified:
        raise InputError(f"simplify_options: expected none for a model with its own blocks, got {dict(simplify_options)}")
    config = configuration(spec, overrides)
    model: Any = _build(spec, config, device)
    if hasattr(model.visual, "set_input_size") and "image_size" in overrides.get("vision_cfg", {}):
        model.visual.set_input_size(config["vision_cfg"]["image_size"])  # open_clip does not pass the size to timm's trunk
    set_model_preprocess_cfg(model, merge_preprocess_dict(PreprocessCfg(size=model.visual.image_size), dict(spec.preprocess)))
    model.origins = spec.origins
    if simplified and (spec.simplify is not None or simplify_options is not None):
        model, model.simplify_report = simplify(model, **{**(spec.simplify or {}), **(simplify_options or {})})
    if spec.channels_last:
        model.visual.to(memory_format=torch.channels_last)
    if state is not None:
        load_exactly(model, state, str(checkpoint))
    return model.to(device)


def _build(spec: Spec, config: dict[str, Any], device: str | torch.device) -> Any:
    """Makes a model with random weights and its own blocks."""
    custom_text = config.pop("custom_text", False)
    if spec.build is not None:
        return spec.build(**config)
    if spec.original not in open_clip.list_models():
        return CustomTextCLIP(**config)
    config["text_cfg"]["hf_model_pretrained"] = False
    config |= {"pretrained_text": False, "force_custom_text": custom_text}
    root, keep = logging.getLogger(), lambda record: not record.getMessage().startswith("No pretrained weights loaded")
    root.addFilter(keep)  # the weights are random on purpose, or loaded later
    try:
        return open_clip.create_model(spec.original, device=device, **config)
    finally:
        root.removeFilter(keep)


def tokenizer(name: str, context_length: int | None = None) -> Tokenizer:
    """Returns a model's tokenizer: list of strings -> token ids, int64 [B, L]. context_length: L, by default the model's."""
    spec = spec_of(name)
    if spec.tokenizer is None:
        return open_clip.get_tokenizer(spec.original, context_length=context_length)
    return spec.tokenizer(context_length or spec.config["text_cfg"]["context_length"])


def transforms(
    name: str,
    *,
    train: bool,
    augment: str | Mapping[str, Any] | AugmentationCfg | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> ImageTransform | Callable[[Image.Image], torch.Tensor]:
    """The image transform of a model. Called with a PIL image, it returns float32 [3, S, S], as open_clip's preprocess does.

    Args:
        name: as for `create`.
        train: whether to augment.
        augment: the augmentation for training: open_clip's AugmentationCfg or its fields (random resized crop and more);
            "affine" (small rotations, shifts, zooms and changes of colour without mirroring, for drawings on white);
            "none"; or None for the model's default. With its `use_timm` the result is open_clip's own, for PIL images only.
        image_size: S, if the model was created with another size than its default.
    """
    spec = spec_of(name)
    size = image_size or spec.config["vision_cfg"].get("image_size", PreprocessCfg.size)
    cfg = PreprocessCfg(**merge_preprocess_dict(PreprocessCfg(), {**spec.preprocess, "size": size}))
    augment = spec.augment if augment is None else augment
    if not train or augment == "none":
        return ImageTransform(cfg)
    if getattr(augment, "use_timm", False) or (isinstance(augment, Mapping) and augment.get("use_timm")):
        return image_transform_v2(cfg, is_train=True, aug_cfg=dict(augment) if isinstance(augment, Mapping) else augment)
    return ImageTransform(cfg, augment)


@torch.no_grad()
def check_shape(model: nn.Module, tokenizer: Tokenizer) -> None:
    """Raises InputError if a tower cannot encode an image of the model's size, or a text of the tokenizer's length."""
    towers: Any = model
    size, tokens, training = to_2tuple(towers.visual.image_size), tokenizer(["a photo"]), model.training
    model.eval()
    for name, encode, inputs, got in (
        ("image_size", towers.encode_image, torch.zeros(1, 3, *size), size[0]),
        ("context_length", towers.encode_text, tokens, tokens.shape[1]),
    ):
        try:
            encode(inputs)
        except Exception as error:  # its type depends on the tower
            raise InputError(f"{name}: expected one that the model takes, got {got}: {first_line(error)}") from None
    model.train(training)


def text_pool(model: nn.Module) -> str | None:
    """Returns how open_clip's text tower pools its tokens, e.g. "argmax"; None for other towers."""
    tower: Mapping[str, Any] = vars(getattr(model, "text", None) or model)
    return tower.get("pool_type", tower.get("text_pool_type"))


def spec_of(name: str) -> Spec:
    """Returns the recipe of the model of this name. Raises ValueError for an unknown name."""
    if name in _SPECS:
        return _SPECS[name]
    plain = name.removeprefix(PLAIN)
    if name.startswith(PLAIN) and plain in open_clip.list_models():
        return Spec(plain, open_clip.get_model_config(plain), None, {}, {})
    all_names = [*names(), *(PLAIN + n for n in open_clip.list_models())]
    near = difflib.get_close_matches(name, all_names, 3) or difflib.get_close_matches(PLAIN + name, all_names, 3)
    raise InputError(f"name: expected one of {names()} or {PLAIN}NAME, got {name!r}; nearest: {near}")
