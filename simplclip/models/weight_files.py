"""Files of weights: read without running code from them, and without filling the memory from a small file."""

import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import torch

from simplclip.common.errors import InputError
from simplclip.models.mobileclip import where_to_get

_MOST_VALUES = 50_000_000  # in a file of weights
_SMALL = 1 << 24  # bytes up to which a tensor may be larger than its storage, as one made by `expand` is


def read_weights(path: str | os.PathLike[str], error: type[InputError], expected: str, got: str = "") -> Any:
    """Reads a file NAME.safetensors, or of torch.save with weights_only. Raises FileNotFoundError; `error` for other files.

    expected: begins the message. got: the name of the file in the message, by default its path.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"{expected}, got no such file: {path}{where_to_get(path)}")
    try:
        check_archive(path)
        if os.fspath(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        contents = torch.load(path, map_location="cpu", weights_only=True)
        _check_contents(contents)
        return contents
    except (ModuleNotFoundError, FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as fault:  # the type depends on the damage: pickle, zip, EOF, runtime and safetensors' errors
        raise error(f"{expected}, got {got or path}: {refusal(fault) or first_line(fault)}") from None


def bare_state(state: Any) -> Any:
    """Returns a state dict, bare or under "state_dict" or "model", without DistributedDataParallel's prefix "module."."""
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    return {str(name).removeprefix("module."): v for name, v in state.items()} if isinstance(state, Mapping) else state


def refusal(fault: Exception) -> str:
    """Returns why torch.load refused a file with weights_only, without torch's advice to read it anyway; else ""."""
    if not isinstance(fault, pickle.UnpicklingError) and "weights_only" not in str(fault):
        return ""
    refused = re.search(r"(?:GLOBAL|global) [\w.]+", str(fault))
    return f"its pickle does more than store tensors ({refused[0] if refused else 'weights_only refuses it'})"


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_archive(path: str | os.PathLike[str]) -> None:
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
        if isinstance(value, torch.Tensor):
            size = value.numel() * value.element_size()
            if size > _SMALL and value.layout == torch.strided and size > value.untyped_storage().nbytes():
                raise InputError(f"a tensor of shape {list(value.shape)} is stored with fewer numbers")
            return 1
        if not isinstance(value, (Mapping, list, tuple, set)):
            return 1
        if id(value) not in counts:
            counts[id(value)] = _MOST_VALUES + 1  # while the container is counted, since it may hold itself
            parts = [part for pair in value.items() for part in pair] if isinstance(value, Mapping) else value
            counts[id(value)] = 1 + sum(map(count, parts))
        return counts[id(value)]

    if count(contents) > _MOST_VALUES:
        raise InputError(f"more than {_MOST_VALUES:,} values, some in each other")
