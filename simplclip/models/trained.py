"""Trained models: of the settings of a run, of a checkpoint or an export, of any source of `load`.

A checkpoint or export may come from elsewhere, so it is only data. It is read with weights_only,
and of its config only the part "model" and `loss.base` count. The model's options may describe an
architecture; an option that could fetch, unpickle or run files is refused.

A checkpoint is one dict that torch.save wrote:
    format, version     "simplclip", 1
    model, ema          state dicts of the weights, and of their averages if the run has averages
    start               CRC-32 of each tensor of the weights with which the run began
    adapter, base       with LoRA in place of "model" and "start": what changes, and the SHA-256 of
                        base.pt, whose "weights" are those with which the run began;
                        `read_checkpoint` joins them
    step                optimizer steps done
    config              the settings of the run as a plain dict
    ...                 what the trainer needs to continue, see `simplclip.train.checkpoint`
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
from open_clip.model import get_model_preprocess_cfg, set_model_preprocess_cfg
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from torch import nn

from simplclip.common.errors import InputError, first_line
from simplclip.data.transforms import ImageTransform
from simplclip.models import registry
from simplclip.models.naming import EXPORT, EXPORTED_WEIGHTS, PLAIN
from simplclip.models.registry import Tokenizer, create
from simplclip.models.weights import (
    CheckpointError,
    Source,
    load_error,
    load_exactly,
    merged,
    needs_quick_gelu,
    parse_source,
    read_state,
    read_weights,
    with_base,
)

FORMAT, VERSION = "simplclip", 1
# initial values of SigLIP, arXiv 2303.15343
SIGLIP = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}

# setting -> the part of the options that may have it too
_SHAPE = {"image_size": "vision_cfg", "context_length": "text_cfg"}
# Options that describe a model's architecture and its pixels. Other options of open_clip, such as
# pretrained and weights_only, load files.
_ARCHITECTURE = {
    *("vision_cfg", "text_cfg", "multimodal_cfg", "embed_dim", "custom_text", "quick_gelu"),
    *("output_dict", "init_logit_scale", "init_logit_bias", "nonscalar_logit_scale"),
    *("simplified", "simplify_options", "preprocess"),
}
_TOKENIZER_OPTIONS = {"clean", "strip_sep_token"}


def shape_of(section: Mapping[str, Any], name: str) -> Any:
    """Returns "image_size" or "context_length" of a config's part "model"; None: the model's."""
    options = section.get("options") or {}
    return section.get(name) or (options.get(_SHAPE[name]) or {}).get(name)


def model_options(section: Mapping[str, Any], base: str = "contrastive") -> dict[str, Any]:
    """Returns a new dict of keyword arguments of `models.create` for a config's part "model".

    base: loss.base of the config. With "sigmoid" the scale and the bias start as SigLIP's, unless
    the options have them.
    """
    options: dict[str, Any] = dict(SIGLIP) if base == "sigmoid" else {}
    options |= section.get("options") or {}
    for name, part in _SHAPE.items():
        value = shape_of(section, name)
        if value:
            options[part] = {**(options.get(part) or {}), name: value}
    return options


def build_model(section: Mapping[str, Any], base: str = "contrastive") -> nn.Module:
    """Makes the model of a config's part "model", with random weights; reads and fetches no file.

    base: loss.base of the config. Raises InputError for options that the model does not take, and
    as `check_options` does.
    """
    name = section["name"]
    try:
        options = model_options(section, base)
        check_options(options, "config")
        return create(name, **options)
    except (InputError, ImportError, OSError):
        raise
    except Exception as error:  # the type depends on the option
        got = f"{section.get('options')}: {first_line(error)}"
        raise InputError(f"model.options: expected options of {name}, got {got}") from error


def tokenizer(section: Mapping[str, Any]) -> Tokenizer:
    """Returns the tokenizer of a config's part "model": list of texts -> int64 [N, L]."""
    return registry.tokenizer(section["name"], shape_of(section, "context_length"))


def image_transform(
    section: Mapping[str, Any], train: bool = False, augment: str | Mapping[str, Any] | None = None
) -> ImageTransform:
    """Returns the image transform of a config's part "model", see `models.transforms`."""
    return registry.transforms(
        section["name"],
        train=train,
        augment=augment,
        image_size=shape_of(section, "image_size"),
        preprocess=(section.get("options") or {}).get("preprocess"),
    )


def other_pixels(source: str, transform: ImageTransform) -> str | None:
    """Returns model.options.preprocess for an open_clip tag with other pixels than `transform`'s.

    None for equal mean and std, and for a source other than NAME/TAG.
    """
    parsed = parse_source(source)
    if not parsed.tag or parsed.file:
        return None
    tagged = open_clip.get_pretrained_cfg(parsed.name.removeprefix(PLAIN), parsed.tag)
    mean, std = (tuple(tagged.get(key, getattr(transform, key))) for key in ("mean", "std"))
    if (mean, std) == (transform.mean, transform.std):
        return None
    return f"{{mean: {[*mean]}, std: {[*std]}}}"


def check_options(options: Mapping[str, Any], file: str) -> None:
    """Raises InputError, with `file`'s name, unless model.options only describe an architecture.

    Refused are options that could fetch, unpickle or run files (pretrained, weights_only,
    hf_model_name, a path or a URL in place of a model's name).
    """
    refused = {key: value for key, value in options.items() if key not in _ARCHITECTURE}
    for key, part in options.items():
        for name, value in part.items() if isinstance(part, Mapping) else ():
            if value and _fetches(str(name), value):
                refused[f"{key}.{name}"] = value
    if refused:
        path, value = next(iter(refused.items()))
        raise InputError(
            f"{file}: expected options of the model's architecture, got model.options.{path} = "
            f"{str(value)[:100]!r}, which may fetch or run files"
        )


def _fetches(name: str, value: Any) -> bool:
    """Whether an option, without the section's name, could make a model fetch or run files."""
    if name == "timm_model_name":  # timm takes hf-hub:OWNER/NAME and local-dir:PATH for names, too
        return bool(set(":/\\") & set(str(value)))
    if name == "tokenizer_kwargs":
        return not (isinstance(value, Mapping) and value.keys() <= _TOKENIZER_OPTIONS)
    return name.startswith("hf_")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint, or the best.pt or else last.pt of a run's folder, to the CPU.

    Returns the dict that the module describes, checked for "model", "config" and "step".
    """
    path = parse_source(path).file
    state = read_weights(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: expected a simplclip checkpoint, got a file without format={FORMAT!r}"
        )
    version = state.get("version")
    if not isinstance(version, int) or version > VERSION:
        got = f"{str(version)[:100]!r}, maybe of a newer simplclip"
        raise CheckpointError(f"{path}: expected checkpoint version {VERSION} or lower, got {got}")
    with contextlib.suppress(LookupError, TypeError):
        known = isinstance(state["config"]["model"]["name"], str)
        if known and state.keys() & {"model", "adapter"} and isinstance(state["step"], int):
            return with_base(path, state)
    raise CheckpointError(
        f"{path}: expected a checkpoint with a config and weights, got one without"
    )


def load_model(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Loads the model of a checkpoint, or of a run's folder; with averages if the run has them.

    Returns the model in eval mode on the CPU, and what `read_checkpoint` returns.
    """
    state = read_checkpoint(path)
    section = state["config"]["model"]
    try:
        model = build_model(section, state["config"]["loss"]["base"])
        model.load_state_dict(merged(state), strict=True)
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # the type depends on the options, and on the damage
        raise CheckpointError(
            f"{path}: expected weights of {section['name']!r}, the model of its config, got "
            f"others: {load_error(error)}"
        ) from None
    return model.eval(), state


def load_source(parsed: Source) -> dict[str, Any]:
    """Loads the model that a source names, see `simplclip.models.weights` and `simplclip.load`.

    Beside a file of weights, a tag says only the preprocessing. A model of open_clip with a single
    known tag gets its preprocessing.

    Returns: "name", "model", "preprocess" (RGB image -> float32 [3, S, S]), "tokenizer" (texts ->
    int64 [N, L]); also "step" of a checkpoint or export, and "config" of a checkpoint.
    """
    if parsed.name.startswith(PLAIN):
        return _load_open_clip(parsed)
    if parsed.name:
        return _parts({"name": parsed.name}, create(parsed.name, checkpoint=parsed.file))
    if not parsed.is_run:
        return _load_export(Path(parsed.file).parent)
    model, state = load_model(parsed.file)
    parts = _parts(state["config"]["model"], model)
    return parts | {"config": state["config"], "step": state["step"]}


def _load_export(folder: Path) -> dict[str, Any]:
    """Returns what `load_source` returns for the folder of an export."""
    file = folder / EXPORT
    try:
        about = json.loads(file.read_text("utf-8"))
        name = str(about["model"])
        options = dict(about["options"])
        step = int(about["step"])
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
        raise CheckpointError(
            f"{file}: expected a file of simplclip export, got one without its contents"
        ) from None
    section = {"name": name, "options": options}
    try:
        model = build_model(section)
    except InputError as error:
        raise CheckpointError(f"{file}: {error}") from None
    weights = folder / EXPORTED_WEIGHTS
    load_exactly(model, read_state(weights, "checkpoint"), str(weights))
    return _parts(section, model) | {"step": step}


def _parts(section: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Returns what `load_source` returns of any model; the image size is the model's."""
    return {
        "name": section["name"],
        "model": model,
        "preprocess": image_transform({**section, "image_size": model.visual.image_size}),
        "tokenizer": tokenizer(section),
    }


def _load_open_clip(source: Source) -> dict[str, Any]:
    """Returns what `load_source` returns; a tag, or the only one, decides pixels and activation."""
    name, plain = source.name, source.name.removeprefix(PLAIN)
    tokenizer = registry.tokenizer(name)  # raises an error that lists the nearest names
    tags = open_clip.list_pretrained_tags_by_model(plain)
    known = source.tag in tags
    if source.tag and not known or not (known or source.file):
        raise FileNotFoundError(
            f"source: expected a file of weights for {name}, or a tag that open_clip downloads "
            f"({', '.join(tags) or 'it has none'}), got {source.tag or 'none'}"
        )
    if not source.file:
        model: Any = source.load()
    else:
        tag = source.tag if known else (tags[0] if len(tags) == 1 else "")
        options: dict[str, Any] = (
            {"quick_gelu": True} if tag and needs_quick_gelu(plain, tag) else {}
        )
        model = create(name, checkpoint=source.file, **options)
        if tag:
            # None keeps the model's size
            tagged = open_clip.get_pretrained_cfg(plain, tag) | {"size": None}
            preprocess = merge_preprocess_dict(get_model_preprocess_cfg(model), tagged)
            set_model_preprocess_cfg(model, preprocess)
    transform = image_transform_v2(PreprocessCfg(**get_model_preprocess_cfg(model)), is_train=False)
    return {
        "name": f"{name}/{source.tag}" if known else name,
        "model": model,
        "preprocess": transform,
        "tokenizer": tokenizer,
    }
