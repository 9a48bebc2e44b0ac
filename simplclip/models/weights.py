"""Weights for a model: `state_of` reads them from files, runs, exports, packages and open_clip's tags; `load_weights` copies
all tensors that fit into a model. `inherit` copies and freezes whole modules."""

import difflib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from simplclip.models import packaged
from simplclip.models.mobileclip import from_published, where_to_get
from simplclip.models.weight_files import bare_state, first_line, read_weights
from simplclip.models.weight_table import InheritanceError, Status, Unit, Units, WeightTable, alike

__all__ = ["InheritanceError", "Source", "WeightTable", "load_weights", "state_of"]

TAG = "open_clip:"

Source = str | os.PathLike[str] | nn.Module | Mapping[str, Any]


def load_weights(model: nn.Module, source: Source) -> WeightTable:
    """Copies into ``model``, in place, every tensor of ``source`` whose name and shape the model has. Nothing is frozen.

    Positional embeddings of another image size or context length are interpolated: over the grid of the image (bicubic, its
    prefix tokens kept) or along the text (linear), as open_clip does. Tensors in a `SimplifiedBlock` are taken from a
    simplified block alone, since equal names may have another meaning. A tensor that modules of the model share is taken if
    the source has one value for it.

    Args:
        model: any model of this library or of open_clip.
        source: as for `inherit`.

    Returns:
        A table of what was loaded, resized, new, of another shape, and left in the source.

    Raises InheritanceError or FileNotFoundError, as `inherit` does, and then leaves the model unchanged.
    """
    label, state = state_of(source, model)
    units = Units(Unit(name, {name: t}, block=unit.block) for unit in Units.of(model) for name, t in unit.tensors.items())
    for unit in units:
        ((name, ours),) = unit.tensors.items()
        if name not in state or not unit.free(state):
            continue
        value = state[name] if alike(ours, state[name]) else _resized(model, name, ours, state[name])
        if value is None:
            unit.status = Status.DIFFERS
        else:
            unit.status, unit.taken = Status.LOADED if value is state[name] else Status.RESIZED, {name: value}
    units.drop_half_tied()
    taken = {name for unit in units for name in unit.taken}
    units.check_enough(state, label, len(taken), len(units))
    units.copy_taken()
    left = Units(Unit(name, {name: tensor}, status=Status.LEFT) for name, tensor in state.items() if name not in taken)
    return WeightTable((*units.rows(), *(left.rows() if left else ())), (label,))


def _resized(model: nn.Module, name: str, ours: Tensor, theirs: Tensor) -> Tensor | None:
    """Resizes a positional embedding [..., tokens, C] to the shape of `ours`; returns None for other tensors."""
    positions = name.rpartition(".")[2] in ("positional_embedding", "pos_embed", "pos_embedding")
    if not positions or ours.shape[:-2] != theirs.shape[:-2] or ours.shape[-1] != theirs.shape[-1]:
        return None
    old, tokens = theirs.reshape(1, -1, theirs.shape[-1]).float(), ours.numel() // ours.shape[-1]
    if not name.startswith("visual."):
        new = nn.functional.interpolate(old.mT, size=tokens, mode="linear").mT
        return new.reshape(ours.shape).to(theirs.dtype)
    visual: Any = model.visual
    grid = visual.grid_size if hasattr(visual, "grid_size") else visual.trunk.patch_embed.grid_size
    prefix = tokens - math.prod(grid)
    side = math.isqrt(max(0, old.shape[1] - prefix))
    if prefix < 0 or side * side != old.shape[1] - prefix or not side:
        return None
    new = resample_abs_pos_embed(old, list(grid), [side, side], num_prefix_tokens=prefix)
    return new.reshape(ours.shape).to(theirs.dtype)


def state_of(source: Source, model: nn.Module) -> tuple[str, dict[str, Tensor]]:
    """Returns the label of a source (as `inherit` takes it), and the source's tensors by their names in `model`."""
    if isinstance(source, str) and source in packaged.SOURCES and not Path(source).exists():
        return source, _packaged(source, model)
    if isinstance(source, nn.Module):
        label, state = type(source).__name__, source.state_dict()
    elif isinstance(source, Mapping):
        label, state = "the state dict", dict(source)
    elif isinstance(source, str | os.PathLike):
        label, state = str(source), dict(_read(source))
    else:
        raise TypeError(f"source: expected a module, a state dict, a path or a name, got {type(source).__name__}")
    state = {name: value for name, value in bare_state(state).items() if isinstance(value, Tensor)}
    if not state:
        raise InheritanceError(f"source: expected weights, got {label}, which has no tensors")
    if hasattr(model, "text"):
        state = from_published(model, state)
        state = convert_to_custom_text_state_dict(convert_state_dict(model, state))
    return label, state


def _packaged(name: str, model: nn.Module) -> dict[str, Tensor]:
    """Returns the packaged weights that a model takes, by their names in the model; see `registry.Spec.origins`."""
    origins = getattr(model, "origins", {})
    if name not in origins:
        takes = ", ".join(origins) or "none by name"
        raise InheritanceError(f"source: expected weights that this model takes ({takes}), got {name!r}")
    state = packaged.SOURCES[name]()
    prefixes = [(n, old, new) for n in state for old, new in origins[name].items() if n.startswith(old)]
    return {new + n.removeprefix(old): state[n] for n, old, new in prefixes}


def _read(source: str | os.PathLike[str]) -> Mapping[str, Any]:
    path = _file_in(Path(source)) if Path(source).is_dir() else Path(source)
    name, slash, tag = str(source).removeprefix(TAG).partition("/")
    if not path.is_file() and slash and (str(source).startswith(TAG) or name in open_clip.list_models()):
        return _download(name, tag)
    if not path.is_file():
        expected = f"a file, open_clip's NAME/TAG or one of {', '.join(packaged.SOURCES)}"
        raise FileNotFoundError(f"source: expected {expected}, got {path}{where_to_get(path)}")
    state = read_weights(path, InheritanceError, "source: expected weights, readable without running code")
    if not isinstance(state, Mapping):
        raise InheritanceError(f"source: expected a state dict in {path}, got {type(state).__name__}")
    return {**bare_state(state), **state.get("ema", {})}  # of a run: with its averages, if it has some


def _file_in(folder: Path) -> Path:
    """Returns the file of weights in the folder of a run or of an export."""
    files = [path for name in ("last.pt", "*.safetensors", "*.pt", "*.bin") for path in sorted(folder.glob(name))]
    if not files:
        raise FileNotFoundError(f"source: expected the folder of a run or of an export with weights for torch, got {folder}")
    return files[0]


def _download(name: str, tag: str) -> Mapping[str, Any]:
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags:
        near = difflib.get_close_matches(tag, tags, 5, 0.0) or difflib.get_close_matches(name, open_clip.list_models(), 3)
        hint = f"nearest tags: {', '.join(near)}" if tags else f"it has no tags for {name}; nearest models: {near}"
        raise InheritanceError(f"source: expected open_clip's NAME/TAG, got {name}/{tag}; {hint}")
    try:
        return open_clip.create_model(name, pretrained=tag).state_dict()
    except (OSError, RuntimeError) as error:
        raise InheritanceError(f"source: open_clip could not get {name}/{tag}: {first_line(error)}") from None
