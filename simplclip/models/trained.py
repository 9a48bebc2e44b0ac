"""Models from the settings of a run, from the checkpoints that a run writes, and from the exports of these.

A checkpoint or export may come from elsewhere, so it is data alone. It is read with weights_only, and of its config only the
part "model" and `loss.base` count. The model's options may describe an architecture; an option that could fetch, unpickle or
run files is refused.

A checkpoint is one dict that torch.save wrote:
    format, version     "simplclip", 1
    model, ema          state dicts of the weights, and of their averages if the run has averages
    step                optimizer steps done
    config              the settings of the run as a plain dict
    ...                 what the trainer needs to continue, see `simplclip.train.checkpoint`
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from simplclip.common.errors import InputError
from simplclip.models.registry import Tokenizer, check_shape, create, transforms
from simplclip.models.registry import tokenizer as tokenizer_of
from simplclip.models.weights import CheckpointError, load_error, read_weights

FORMAT, VERSION = "simplclip", 1
EXPORT = "export.json"  # describes the folder of an export
SIGLIP = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}  # initial values of SigLIP, arXiv 2303.15343

_SHAPE = {"image_size": "vision_cfg", "context_length": "text_cfg"}  # setting -> the part of the options that may have it too
# Options that describe a model's architecture. Other options of open_clip, such as pretrained and weights_only, load files.
_ARCHITECTURE = {
    *("vision_cfg", "text_cfg", "multimodal_cfg", "embed_dim", "custom_text", "quick_gelu", "output_dict"),
    *("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale", "simplified", "simplify_options"),
    *("force_quick_gelu", "force_custom_text", "force_patch_dropout", "force_image_size", "force_context_length"),
}
_TOKENIZER_OPTIONS = {"clean", "strip_sep_token"}
_WIDEST, _DEEPEST = 1_000_000, 1000  # the largest width and number of layers that are accepted


def shape_of(section: Mapping[str, Any], name: str) -> Any:
    """Returns the image_size or context_length of a config's part "model", or of its options; None for the model's own."""
    options = section.get("options") or {}
    return section.get(name) or (options.get(_SHAPE[name]) or {}).get(name)


def model_options(section: Mapping[str, Any], base: str = "contrastive") -> dict[str, Any]:
    """Returns arguments of `models.create` for a config's part "model".

    base: loss.base of the config. With "sigmoid" the scale and the bias start as SigLIP's, unless the options have them.
    """
    options: dict[str, Any] = {**(SIGLIP if base == "sigmoid" else {}), **(section.get("options") or {})}
    for name, part in _SHAPE.items():
        value = shape_of(section, name)
        if value:
            options[part] = dict(options.get(part) or {}) | {name: value}
    return options


def build_model(section: Mapping[str, Any], base: str = "contrastive") -> nn.Module:
    """Makes the model of a config's part "model", with random weights. Nothing is fetched, and no file is read.

    section: name, options, image_size and context_length, see `simplclip train --help-config`. base: loss.base of the config.
    Raises InputError for an unknown name, for options that the model does not take, and as `check_options` does.
    """
    name, options = section["name"], model_options(section, base)
    check_options(options, "config")
    try:
        model = create(name, **options)
    except TypeError as error:
        given = section.get("options")
        raise InputError(f"model.options: expected options of {name}, got {given}: {error}") from error
    if shape_of(section, "image_size") or shape_of(section, "context_length"):
        check_shape(model, tokenizer(section))
    return model


def tokenizer(section: Mapping[str, Any]) -> Tokenizer:
    """Returns the tokenizer of a config's part "model": texts -> int64 [N, L]."""
    return tokenizer_of(section["name"], shape_of(section, "context_length"))


def image_transform(section: Mapping[str, Any], train: bool = False, augment: Any = None) -> Callable[..., torch.Tensor]:
    """Returns the image transform of a config's part "model", see `models.transforms`. augment: used if `train`."""
    return transforms(section["name"], train=train, augment=augment, image_size=shape_of(section, "image_size"))


def check_options(options: Mapping[str, Any], where: str) -> None:
    """Checks that model.options describe an architecture. where: the file that has them, for the message.

    Raises InputError for an option that could fetch, unpickle or run files (pretrained, weights_only, hf_model_name, a path
    or a URL in place of a model's name), and for a model of absurd size.
    """
    values = {key: (key, value) for key, value in options.items()}
    for key, part in options.items():
        values |= {f"{key}.{name}": (name, value) for name, value in part.items()} if isinstance(part, Mapping) else {}
    for path, (name, value) in values.items():
        got = f"model.options.{path} = {str(value)[:100]!r}"
        if path.partition(".")[0] not in _ARCHITECTURE or (value and _fetches(str(name), value)):
            expected = "options of the model's architecture"
            raise InputError(f"{where}: expected {expected}, got {got}, which may fetch or run files")
        if isinstance(value, (int, float)) and value > (_DEEPEST if name == "layers" else _WIDEST):
            raise InputError(f"{where}: expected a model that can be built, got model.options.{path} = {value:.3g}")


def _fetches(name: str, value: Any) -> bool:
    if name == "timm_model_name":  # timm takes hf-hub:OWNER/NAME and local-dir:PATH for names, too
        return bool(set(":/\\") & set(str(value)))
    if name == "tokenizer_kwargs":
        return not (isinstance(value, Mapping) and value.keys() <= _TOKENIZER_OPTIONS)
    return name.startswith("hf_")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint, or the last.pt of a run's folder, to the CPU, as a dict with at least "model", "config" and "step".

    Raises FileNotFoundError; CheckpointError for a file that is damaged, no checkpoint, or of a newer version.
    """
    path = Path(path) / "last.pt" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no such file: {path}")
    state = read_weights(path, f"{path}: expected a simplclip checkpoint", "an unreadable file")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected a simplclip checkpoint, got a file without format={FORMAT!r}")
    version = state.get("version")
    if not isinstance(version, int) or version > VERSION:
        got = f"{version}, written by a newer simplclip" if isinstance(version, int) else repr(version)[:100]
        raise CheckpointError(f"{path}: expected checkpoint version {VERSION} or lower, got {got}")
    try:
        complete = "model" in state and isinstance(state["config"]["model"]["name"], str) and isinstance(state["step"], int)
    except (LookupError, TypeError):
        complete = False
    if not complete:
        raise CheckpointError(f"{path}: expected a checkpoint with a config and weights, got another one")
    return state


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """Loads the model of a checkpoint, or of a run's folder; with the averages of its weights if the run has averages.

    Returns: the model in eval mode on `device`, the config (a plain dict), and all that `read_checkpoint` returns.
    Raises: FileNotFoundError; CheckpointError if the file is no checkpoint, if its options are refused, or if its weights do
    not fit.
    """
    state = read_checkpoint(path)
    config = state["config"]
    section = config["model"]
    try:
        model = build_model(section, base_of(config))
        model.load_state_dict(state["model"] | state.get("ema", {}), strict=True)
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # the type depends on the options, and on the damage
        expected = f"weights of {section['name']!r}, the model of its config"
        raise CheckpointError(f"{path}: expected {expected}, got others: {load_error(error)}") from None
    return model.to(device).eval(), config, state


def load_export(folder: str | Path) -> tuple[nn.Module, str, int]:
    """Loads the model of a folder that `simplclip export` wrote.

    Returns: the model in eval mode on the CPU, its name, and the step of its checkpoint.
    Raises: FileNotFoundError; CheckpointError if export.json is another file, or its weights do not fit; InputError if its
    options are refused.
    """
    folder = Path(folder)
    try:
        about = json.loads((folder / EXPORT).read_text("utf-8"))
        name, options, step = str(about["model"]), dict(about["options"]), int(about["step"])
        files = [Path(file).name for file in about["files"]]
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        raise CheckpointError(f"{folder / EXPORT}: expected a file of simplclip export, got another one") from None
    weights = [file for file in files if file.endswith((".safetensors", ".pt"))]
    if not weights:
        raise CheckpointError(f"{folder}: expected an export with weights for torch, got {', '.join(files)}")
    check_options(options, str(folder / EXPORT))
    return create(name, checkpoint=folder / weights[0], **options).eval(), name, step


def base_of(config: Mapping[str, Any]) -> str:
    """Returns loss.base of a checkpoint's config, the argument `base` of `build_model`."""
    loss = config.get("loss")
    return loss.get("base", "contrastive") if isinstance(loss, Mapping) else "contrastive"
