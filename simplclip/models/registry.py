"""Models by name, with their tokenizers and image transforms: SiCLIPs and open_clip's models."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import open_clip
import torch
from open_clip import CLIP, CoCa, CustomTextCLIP
from open_clip.model import set_model_preprocess_cfg
from open_clip.transform import AugmentationCfg, PreprocessCfg
from timm.layers.helpers import to_2tuple
from torch import nn

from simplclip.common.errors import InputError
from simplclip.data.transforms import ImageTransform
from simplclip.models.naming import NAMES, PLAIN, check_name
from simplclip.models.presets import SPECS, Spec, Tokenizer
from simplclip.models.simplify import simplify
from simplclip.models.weights import load_exactly, parse_source

LOOKED_AT = 1000  # captions that are tokenised to count those that are cut


def names() -> list[str]:
    """Returns a new list of the names of MobileCLIP-S0 and this library's SiCLIPs.

    ``open_clip:NAME`` is a name, too, but not listed.
    """
    return list(NAMES)


def configuration(spec: Spec, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Returns open_clip's configuration for arguments of `create`; it fetches no weights."""
    config = {**spec.config, **overrides}
    for part in ("vision_cfg", "text_cfg"):
        config[part] = {**spec.config.get(part, {}), **overrides.get(part, {})}
    config["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in config["text_cfg"]:
        config["text_cfg"]["hf_model_pretrained"] = False
    return config


def create(
    name: str | Spec,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    simplified: bool = True,
    simplify_options: Mapping[str, Any] | None = None,
    preprocess: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> nn.Module:
    """Builds a model with random weights, or with those of a checkpoint; downloads nothing.

    Args:
        name: one of `names`, or ``open_clip:NAME`` for the plain open_clip model; or a `Spec`.
        checkpoint: a file of weights as for `inherit`, which must fit exactly.
        simplified: False for the model that a SiCLIP is made from, with its own blocks.
        simplify_options: arguments of `simplify` that replace those of the name. If they are given,
            even as {}, a model that is no SiCLIP is simplified too.
        preprocess: fields of open_clip's PreprocessCfg (mean, std, interpolation, resize_mode,
            fill_color) that replace those of the name. The size is the model's.
        overrides: open_clip's model arguments. ``vision_cfg`` and ``text_cfg`` are merged into
            those of the name, others (``embed_dim``, ``init_logit_scale``, ``output_dict``...)
            replace them.

    Returns an open_clip model, if simplified with the attribute ``simplify_report``. Raises
    InputError for an unknown name, CheckpointError for a checkpoint that does not fit.
    """
    state = None if checkpoint is None else parse_source(checkpoint).load("checkpoint")
    spec = spec_of(name) if isinstance(name, str) else name
    if simplify_options and not simplified:
        raise InputError(
            "simplify_options: expected none for a model with its own blocks, got "
            f"{dict(simplify_options)}"
        )
    config = configuration(spec, overrides)
    text_cfg = config["text_cfg"]
    # as open_clip's create_model decides; version 3.3 has neither modern nor variable texts
    custom_text = (
        config.pop("custom_text", False)
        or "hf_model_name" in text_cfg
        or text_cfg.get("text_arch") == "modern"
        or text_cfg.get("variable_text", False)
    )
    build: Callable[..., Any] = CLIP
    if spec.build is not None:
        build = spec.build
    elif "multimodal_cfg" in config:
        build = CoCa
    elif custom_text:
        build = CustomTextCLIP
    model: Any = build(**config)
    if hasattr(model.visual, "set_input_size") and "image_size" in overrides.get("vision_cfg", {}):
        # open_clip does not pass the size to timm's trunk
        model.visual.set_input_size(config["vision_cfg"]["image_size"])
    preprocessing = _preprocessing(spec, model.visual.image_size, preprocess)
    set_model_preprocess_cfg(model, asdict(preprocessing))
    if simplified and (spec.simplify is not None or simplify_options is not None):
        options = {**(spec.simplify or {}), **(simplify_options or {})}
        model, model.simplify_report = simplify(model, **options)
    if spec.channels_last:
        model.visual.to(memory_format=torch.channels_last)
    if state is not None:
        load_exactly(model, state, str(checkpoint))
    return model.to(device)


create_model = create  # simplclip.create_model

# values of open_clip's PreprocessCfg, which checks none
_KNOWN = {
    "interpolation": ("bicubic", "bilinear"),
    "resize_mode": ("shortest", "longest", "squash"),
}


def _preprocessing(
    spec: Spec, size: int | tuple[int, int], changes: Mapping[str, Any] | None
) -> PreprocessCfg:
    """Returns a recipe's preprocessing with some fields replaced; InputError for other values."""
    cfg = PreprocessCfg(size=size, **{**spec.preprocess, **(changes or {})})
    for name, known in _KNOWN.items():
        if getattr(cfg, name) not in known:
            expected = f"one of {', '.join(known)}"
            raise InputError(f"preprocess.{name}: expected {expected}, got {getattr(cfg, name)!r}")
    return cfg


def tokenizer(name: str, context_length: int | None = None) -> Tokenizer:
    """Returns a model's tokenizer: list of strings -> token ids, int64 [B, L].

    context_length: L, None or 0 for the model's. Raises InputError for an unknown name. A tokenizer
    of a Hugging Face model may be downloaded.
    """
    spec = spec_of(name)
    length = context_length or spec.config["text_cfg"].get("context_length", 77)
    return spec.tokenizer(context_length=length)


def transforms(
    name: str,
    *,
    train: bool,
    augment: str | Mapping[str, Any] | AugmentationCfg | None = None,
    image_size: int | tuple[int, int] | None = None,
    preprocess: Mapping[str, Any] | None = None,
) -> ImageTransform:
    """Returns the image transform of a model: PIL image -> float32 [3, S, S], as open_clip's.

    Args:
        name: as for `create`.
        train: whether to augment.
        augment: the augmentation for training, as `data.transforms.ImageTransform` takes it; or
            "none"; or None for the model's default.
        image_size: S, or (height, width), if the model was created with another size than its
            default.
        preprocess: as for `create`.
    """
    spec = spec_of(name)
    size = image_size or spec.config["vision_cfg"].get("image_size", PreprocessCfg.size)
    # of a config's (height, width) YAML and JSON make a list
    cfg = _preprocessing(spec, to_2tuple(size), preprocess)
    if augment is None:
        augment = spec.augment
    if not train or augment == "none":
        augment = None
    return ImageTransform(cfg, augment)


def spec_of(name: str) -> Spec:
    """Returns the recipe of a model by its name, as for `create`; InputError if it is unknown."""
    if name in SPECS:
        return SPECS[name]
    check_name(name)
    plain = name.removeprefix(PLAIN)
    config = open_clip.get_model_config(plain)
    return Spec(config, partial(open_clip.get_tokenizer, plain))


def cut_in_words(tokenize: Tokenizer, captions: Sequence[str]) -> str | None:
    """Returns a sentence on how many captions are cut; None if none is, of up to LOOKED_AT."""
    looked_at = captions[:: -(-len(captions) // LOOKED_AT) or 1]
    ids = tokenize([*looked_at, ""])
    length = ids.shape[1]
    longer = tokenize([*looked_at, ""], context_length=2 * length)  # type: ignore[call-arg]
    # tokens that differ from those of an empty text, whatever a tokenizer puts in their place
    cut = int(((longer != longer[-1]).sum(1) > (ids != ids[-1]).sum(1)).sum())
    if not cut:
        return None
    return (
        f"{cut / len(looked_at):.1%} of {len(looked_at):,} captions looked at are cut, since they "
        f"have more than {length} tokens with start and end; write shorter ones, or train with a "
        "larger model.context_length"
    )
