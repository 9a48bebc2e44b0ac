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
    activation,
    load_error,
    load_exactly,
    merged,
    parse_source,
    read_weights,
    with_base,
)

FORMAT, VERSION = "simplclip", 1
# initial values of SigLIP, arXiv 2303.15343
SIGLIP = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}

# setting -> the part of the options that may have it too
_SHAPE = {"image_size": "vision_cfg", "context_length": "text_cfg"}
# other arguments of tokenizers may run code
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
        # an option of the same name would be an error
        return create(name, checkpoint=None, device="cpu", **options)
    except (InputError, ImportError, OSError):
        raise
    except Exception as error:  # the type depends on the option
        got = f"{section.get('options')}: {first_line(error)}"
        raise InputError(f"model.options: expected options of {name}, got {got}") from error


def tokenizer(section: Mapping[str, Any]) -> Tokenizer:
    """Returns the tokenizer of a config's part "model"."""
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
    """Raises InputError, with `file`'s name, if model.options could fetch files or run code.

    Such are the names of models on a hub, paths in their place, and arguments of tokenizers.
    """
    parts = {key: part for key, part in options.items() if isinstance(part, Mapping)}
    for key, part in parts.items():
        for name, value in part.items():
            # timm takes hf-hub:OWNER/NAME and local-dir:PATH for names, too
            path = name == "timm_model_name" and {*":/\\"} & {*str(value)}
            known = isinstance(value, Mapping) and value.keys() <= _TOKENIZER_OPTIONS
            loads = name.startswith("hf_") or (name == "tokenizer_kwargs" and not known)
            if value and (path or loads):
                raise InputError(
                    f"{file}: expected options of the model's architecture, got model.options."
                    f"{key}.{name} = {str(value)[:100]!r}, which may fetch or run files"
                )


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint, or the best.pt or else last.pt of a run's folder, to the CPU.

    Returns the dict that the module describes, checked for "model", "config" and "step".
    """
    path = parse_source(path).file
    state = read_weights(path)
    with contextlib.suppress(LookupError, TypeError):
        of_this_version = (state["format"], state["version"]) == (FORMAT, VERSION)
        named = isinstance(state["config"]["model"]["name"], str)
        whole = bool(state.keys() & {"model", "adapter"}) and isinstance(state["step"], int)
        if of_this_version and named and whole:
            return with_base(path, state)
    raise CheckpointError(
        f"{path}: expected a checkpoint of simplclip train, version {VERSION}, with a config and "
        "weights, got another file, maybe of a newer simplclip"
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
        section = {"name": str(about["model"]), "options": dict(about["options"])}
        step = int(about["step"])
        model = build_model(section)
    except (ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"{file}: expected a file of simplclip export, got {first_line(error)}"
        ) from None
    weights = str(folder / EXPORTED_WEIGHTS)
    load_exactly(model, parse_source(weights).load("checkpoint"), weights)
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
    if source.tag not in tags and (source.tag or not source.file):
        raise FileNotFoundError(
            f"source: expected a file of weights for {name}, or a tag that open_clip downloads "
            f"({', '.join(tags) or 'it has none'}), got {source.tag or 'none'}"
        )
    if source.file:
        tag = tags[0] if len(tags) == 1 else source.tag
        model: Any = create(name, checkpoint=source.file, **activation(plain, tag))
        # None keeps the model's size
        tagged = open_clip.get_pretrained_cfg(plain, tag) | {"size": None}
        preprocess = merge_preprocess_dict(get_model_preprocess_cfg(model), tagged)
        set_model_preprocess_cfg(model, preprocess)
    else:
        model = source.load()
    transform = image_transform_v2(PreprocessCfg(**get_model_preprocess_cfg(model)), is_train=False)
    return {
        "name": f"{name}/{source.tag}" if source.tag else name,
        "model": model,
        "preprocess": transform,
        "tokenizer": tokenizer,
    }
