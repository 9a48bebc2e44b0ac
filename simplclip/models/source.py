"""A trained model with its preprocessing, from a run, a checkpoint, an export, a file of weights or a tag of open_clip."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import open_clip
from open_clip.model import get_model_preprocess_cfg, get_model_tokenize_cfg, set_model_preprocess_cfg
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

from simplclip.common.errors import InputError
from simplclip.models import registry
from simplclip.models.mobileclip import where_to_get
from simplclip.models.registry import PLAIN, create
from simplclip.models.trained import EXPORT, load_export, load_model
from simplclip.models.weights import CheckpointError, download, read_weights

_FILES = (".pt", ".pth", ".bin", ".safetensors")


def load_source(source: str | os.PathLike, checkpoint: str | os.PathLike | None = None) -> dict[str, Any]:
    """Loads the model that `source` names:

    PATH                        a checkpoint of `simplclip train` or the folder of a run (its last.pt), or the folder of
                                `simplclip export`
    open_clip:NAME/TAG          open_clip's pretrained weights, which it downloads if necessary; with `checkpoint` only the
                                tag's preprocessing is used, and nothing is downloaded
    open_clip:NAME/PATH         weights of that model in a file, .pt or .safetensors
    open_clip:NAME              with `checkpoint`: a file of weights as above
    siclip-tiny, ...            with `checkpoint`: a checkpoint of `simplclip train`, the folder of a run, or a file of the
                                model's weights, for mobileclip-s0 also the published file. siclip-tiny/PATH means the same

    Without a tag, an open_clip model with a single known tag gets the preprocessing of this tag.

    Returns: "name", "model", "preprocess" (RGB image -> float32 [3, S, S]), "tokenizer" (texts -> int64 [N, L]); also "step"
    of a checkpoint or export, and "config" of a checkpoint.
    Raises: InputError if the source is unknown or has no weights, FileNotFoundError, CheckpointError if a file is not a
    checkpoint of that model.
    """
    source = os.fspath(source)
    name, _, rest = source.removeprefix(PLAIN).partition("/")
    if checkpoint is not None and not Path(checkpoint).exists():
        raise _missing(checkpoint)
    if source.startswith(PLAIN):
        return _open_clip(name, rest, checkpoint)
    if checkpoint is None and Path(source).exists():
        return _run_or_export(Path(source))
    if name in registry.names() and not (rest and checkpoint):
        return _named(name, checkpoint or rest)
    if source.endswith(_FILES) or (rest and checkpoint is None):
        raise _missing(source)
    known = ", ".join((*registry.names(), f"{PLAIN}NAME", f"{PLAIN}NAME/TAG"))
    raise InputError(f"source: expected a checkpoint, the folder of a run or an export, or {known}, got {source!r}")


def _missing(path: str | os.PathLike) -> FileNotFoundError:
    return FileNotFoundError(f"checkpoint: no such file: {path}{where_to_get(path)}")


# Each of the following functions returns what `load_source` returns.


def _run_or_export(path: Path) -> dict[str, Any]:
    if (path / EXPORT).is_file() and not (path / "last.pt").exists():
        model, name, step = load_export(path)
        return _parts(name, model) | {"step": step}
    model, config, state = load_model(path)
    return _parts(config["model"]["name"], model) | {"config": config, "step": state["step"]}


def _named(name: str, weights: str | os.PathLike) -> dict[str, Any]:
    """For a model of this library and a checkpoint, the folder of a run or of an export, or bare weights."""
    if not weights:
        raise InputError(f"checkpoint: expected a file with the weights of {name!r}, got none{where_to_get(name)}")
    path = Path(weights)
    if not path.exists():
        raise _missing(path)
    if not path.is_dir() and "format" not in read_weights(path):
        return _parts(name, create(name, checkpoint=path))
    parts = _run_or_export(path)
    if parts["name"] != name:
        raise CheckpointError(f"{path}: expected a checkpoint of {name!r}, got one of {parts['name']!r}")
    return parts


def _parts(name: str, model: Any) -> dict[str, Any]:
    """For a model of this library, whose image size and context length may differ from its default."""
    transform = registry.transforms(name, train=False, image_size=model.visual.image_size)
    length = get_model_tokenize_cfg(model).get("context_length")
    return {"name": name, "model": model, "preprocess": transform, "tokenizer": registry.tokenizer(name, length)}


def _open_clip(plain: str, tag: str, checkpoint: str | os.PathLike | None) -> dict[str, Any]:
    """For a model of open_clip. tag: a tag of open_clip, a file of weights, or an empty string."""
    name = PLAIN + plain
    tokenizer = registry.tokenizer(name)  # raises an error that lists the nearest names
    tags = open_clip.list_pretrained_tags_by_model(plain)
    if tag and tag not in tags and checkpoint is None and (tag.endswith(_FILES) or Path(tag).is_file()):
        checkpoint, tag = tag, ""
        if not Path(checkpoint).exists():
            raise _missing(checkpoint)
    if tag and tag not in tags:
        raise InputError(f"source: expected a tag of {plain}, one of {', '.join(tags) or 'none'}, or a file, got {tag!r}")
    if checkpoint is None and not tag:
        known = ", ".join(f"{name}/{tag}" for tag in tags) or "it has none"
        expected = f"a file of weights for {name}, or a tag that open_clip downloads ({known})"
        raise InputError(f"checkpoint: expected {expected}, got none")
    if checkpoint is None:
        model: Any = download(plain, tag)
    else:
        model = create(name, checkpoint=checkpoint)
        if tag or len(tags) == 1:
            tagged = open_clip.get_pretrained_cfg(plain, tag or tags[0]) | {"size": None}  # None keeps the model's size
            set_model_preprocess_cfg(model, merge_preprocess_dict(get_model_preprocess_cfg(model), tagged))
    transform = image_transform_v2(PreprocessCfg(**get_model_preprocess_cfg(model)), is_train=False)
    return {"name": f"{name}/{tag}" if tag else name, "model": model, "preprocess": transform, "tokenizer": tokenizer}
