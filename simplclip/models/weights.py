"""Weights of files and of open_clip's tags, and their tensors by a model's names.

Files are read without running code from them, and without filling the memory from a small file.
"""

import json
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from simplclip.common.errors import InputError, first_line
from simplclip.common.files import sha256
from simplclip.models.file_names import BASE, EXPORT
from simplclip.models.mobileclip import from_published

_MOST_VALUES = 50_000_000  # in a file of weights
# bytes up to which a tensor may be larger than its storage, as one made by `expand` is
_SMALL = 1 << 24


class CheckpointError(InputError):
    """Error for a file that is not a usable checkpoint, or whose weights do not fit.

    The message names the file.
    """


class UnreadableError(CheckpointError):
    """Error for a file that is damaged, or whose pickle does more than store tensors."""


def load_exactly(model: nn.Module, state: Mapping[str, Any] | nn.Module, label: str) -> None:
    """Loads weights, as `renamed` takes them, that must fit exactly into a model, in place.

    A model without a bias gets one if its weights have one (of a sigmoid loss).
    """
    tensors = renamed(state, model)
    if "logit_bias" in tensors and getattr(model, "logit_bias", None) is None:
        model.logit_bias = nn.Parameter(torch.empty_like(tensors["logit_bias"]))
    for name in {"logit_scale", "logit_bias"} & tensors.keys():
        if tensors[name].numel() == 1:  # [] or [1]
            tensors[name] = tensors[name].reshape(getattr(model, name).shape)
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"checkpoint: expected weights that fit the model, got {label}: {load_error(error)}"
        ) from None


def renamed(source: Mapping[str, Any] | nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """Returns the tensors of a state dict or module by their names in `model`, in a new dict.

    The state dict is bare or under "state_dict" or "model". Averages under "ema", as a run has
    them, replace weights; DistributedDataParallel's prefix "module." is removed.
    """
    state = source
    if "adapter" in (() if isinstance(state, nn.Module) else state):
        raise CheckpointError(
            f"source: expected weights, got a checkpoint of LoRA, which has no {BASE} when it is "
            "read by itself; simplclip export merges both"
        )
    if isinstance(state, nn.Module):
        _check_activation(state, model)
        state = state.state_dict()
    averages = state.get("ema")
    for key in ("state_dict", "model"):
        if isinstance(state.get(key), Mapping):
            state = state[key]
    if isinstance(averages, Mapping):
        state = {**state, **averages}
    tensors = {
        str(name).removeprefix("module."): value
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    if hasattr(model, "text"):
        tensors = from_published(model, tensors)
        tensors = convert_to_custom_text_state_dict(convert_state_dict(model, tensors))
    return tensors


def _check_activation(source: nn.Module, model: nn.Module) -> None:
    """Raises CheckpointError if only one of two models has QuickGELU in a common place."""
    theirs, ours = (
        {name.removeprefix("text."): type(module).__name__ for name, module in part.named_modules()}
        for part in (source, model)
    )
    for name, ours_there in ours.items():
        pair = {ours_there, theirs.get(name, ours_there)}
        if len(pair) > 1 and "QuickGELU" in pair:
            raise CheckpointError(
                f"source: expected weights of a model with {ours_there} in {name}, got "
                f"{theirs[name]}; quick_gelu={ours_there != 'QuickGELU'} makes a model that fits "
                "(in a config model.options.quick_gelu)"
            )


def download(name: str, tag: str, argument: str = "source") -> nn.Module:
    """Returns an open_clip model with the weights of a tag, which open_clip downloads if needed.

    Its activation is that of the weights. argument: its name in errors. Raises CheckpointError for
    an unknown tag or a failed download.
    """
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags:
        raise CheckpointError(
            f"{argument}: expected a tag of {name}, one of {', '.join(tags) or 'none'}, got {tag!r}"
        )
    options = {"force_quick_gelu": True} if needs_quick_gelu(name, tag) else {}
    try:
        return open_clip.create_model(name, pretrained=tag, **options)
    except Exception as error:  # the download may raise many types
        reason = first_line(error)
        raise CheckpointError(
            f"{argument}: open_clip could not get {name}/{tag}: {reason}; or name its file"
        ) from None


def needs_quick_gelu(name: str, tag: str) -> bool:
    """Whether a tag's weights were trained with QuickGELU, but the model's configuration lacks it.

    open_clip itself then only warns, and computes other features.
    """
    trained_with: bool = open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False)
    return trained_with and "quick_gelu" not in open_clip.get_model_config(name)


def read_state(path: str | os.PathLike[str], argument: str = "source") -> Mapping[str, Any]:
    """Reads a state dict, which may be nested, see `renamed`; otherwise as `read_weights`."""
    state = read_weights(path, argument)
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"{argument}: expected a state dict in {path}, got {type(state).__name__}"
        )
    if "adapter" not in state:
        return state
    try:
        return {"model": merged(with_base(path, state))}
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(
            f"{argument}: expected adapters that fit their weights in {path}, got others: "
            f"{first_line(error)}"
        ) from None


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Returns the CRC-32 of each tensor's numbers, by its name."""
    return {
        name: zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        for name, tensor in tensors.items()
    }


def with_base(path: str | os.PathLike[str], state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a checkpoint with "model", the state dict of the model as it trains.

    path: of the checkpoint. With LoRA it has "adapter", what changes, in place of "model"; base.pt
    beside it has all weights at the run's start, which come as "start". Raises CheckpointError,
    with its name, for another or a damaged file.
    """
    contents = dict(state)
    if "adapter" not in contents:
        return contents
    file = Path(path).with_name(BASE)
    if not file.is_file() or sha256(file) != contents["base"]:
        got = "another or a damaged one" if file.is_file() else "no such file"
        raise CheckpointError(
            f"{path}: expected {file} of its run, with the weights that LoRA keeps, got {got}"
        )
    adapter, start = contents.pop("adapter"), read_weights(file)["weights"]
    return contents | {"model": {**start, **adapter}, "start": start}


def merged(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the plain weights of a checkpoint of `with_base`; averages, where it has them.

    A weight W [o, i] with adapters A [r, i] and B [o, r] becomes W + alpha / rank B A, in float32.
    Raises an error of any type for contents that do not fit.
    """
    tensors = {**state["model"], **state.get("ema", {})}
    for name in [name for name in tensors if name.endswith(".lora_A")]:
        weight, lora = name.removesuffix(".lora_A"), state["config"]["model"]["lora"]
        a, b = tensors.pop(name).float(), tensors.pop(f"{weight}.lora_B").float()
        w = tensors[weight]
        if w.shape != (b.shape[0], a.shape[1]):  # before a product that may be huge
            raise TypeError(f"{[*b.shape]} and {[*a.shape]} for {weight} {[*w.shape]}")
        tensors[weight] = (w.float() + lora["alpha"] / lora["rank"] * (b @ a)).to(w.dtype)
    return tensors


def read_weights(path: str | os.PathLike, argument: str = "checkpoint") -> Any:
    """Reads a file NAME.safetensors, or of torch.save with weights_only, to the CPU.

    Returns what was saved, of safetensors a dict of tensors. Raises CheckpointError also for a
    flipped bit in an export, or in a file of torch.save, which has checksums.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{argument}: expected a file of weights, got no such file: {path}")
    check_digest(path)
    try:
        _check_archive(path)
        if os.fspath(path).endswith(".safetensors"):
            return load_file(path)
        contents = torch.load(path, map_location="cpu", weights_only=True)
        _check_contents(contents)
        return contents
    # the type depends on the damage: pickle, zip, EOF, runtime, system's and safetensors' errors
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the system does not open the file; without a name torch read nonsense in it
        reason = first_line(error)
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
            # torch's own message advises to read the file anyway.
            refused = re.search(r"(?:GLOBAL|global) [\w.]+", str(error))
            why = refused[0] if refused else "weights_only refuses it"
            reason = f"its pickle does more than store tensors ({why})"
        raise UnreadableError(
            f"{argument}: expected a file of weights, got {path}: {reason}"
        ) from None


def check_digest(path: str | os.PathLike) -> None:
    """Raises CheckpointError for weights with another digest than in an export.json beside them."""
    try:
        about = json.loads(Path(path).with_name(EXPORT).read_text("utf-8"))
        expected = about["files"][Path(path).name]["sha256"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return
    if sha256(Path(path)) != expected:
        raise CheckpointError(
            f"{path}: expected the file that {EXPORT} describes, got another or a damaged one"
        )


def load_error(error: Exception) -> str:
    """Returns what load_state_dict says of tensors that do not fit, in one line."""
    return " ".join(line.strip() for line in str(error).splitlines()[1:])[:300] or first_line(error)


def _check_archive(path: str | os.PathLike[str]) -> None:
    """Raises InputError for a zip that is a program, larger than its file, or damaged."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        # which torch.load does not compare; without them all are 0
        has_checksums = any(member.CRC for member in archive.infolist())
        size = sum(member.file_size for member in archive.infolist())
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise InputError("it is a program of TorchScript, not a state dict")
        # torch.save compresses nothing, so these would not be its own
        if size > os.path.getsize(path):
            raise InputError(
                f"its {size:,} bytes of contents do not fit in its {os.path.getsize(path):,}"
            )
        damaged = archive.testzip() if has_checksums else None
        if damaged:
            raise InputError(f"it is damaged: {damaged} has another checksum")


def _check_contents(contents: Any) -> None:
    """Raises InputError for contents with which a file of few bytes fills the memory."""
    counts: dict[int, int] = {}

    def count(value: Any) -> int:
        """Returns the number of values inside; checks the storage of tensors."""
        if isinstance(value, Tensor) and _exceeds_storage(value):
            shape = list(value.shape)
            raise InputError(f"a tensor of shape {shape} is stored with fewer numbers")
        if not isinstance(value, (Mapping, list, tuple, set)):
            return 1
        if id(value) not in counts:
            # while the container is counted, since it may hold itself
            counts[id(value)] = _MOST_VALUES + 1
            parts = value if not isinstance(value, Mapping) else [*value.keys(), *value.values()]
            counts[id(value)] = 1 + sum(map(count, parts))
        return counts[id(value)]

    if count(contents) > _MOST_VALUES:
        raise InputError(f"more than {_MOST_VALUES:,} values, some in each other")


def _exceeds_storage(tensor: Tensor) -> bool:
    """Whether a tensor of more than 16 MiB is larger than its storage."""
    size = tensor.numel() * tensor.element_size()
    if size <= _SMALL or tensor.layout != torch.strided:
        return False
    return size > tensor.untyped_storage().nbytes()
