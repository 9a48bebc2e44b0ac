"""Weights for a model: `state_of` reads them from files, runs, exports and open_clip's tags. `load_weights` copies all
tensors that fit into a model, and `inherit` copies and freezes whole modules. Both return a `WeightTable` of the result."""

import difflib
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from simplclip.common.errors import InputError
from simplclip.models import packaged
from simplclip.models.mobileclip import from_published, where_to_get
from simplclip.models.registry import bare_state, first_line, read_weights
from simplclip.nn import SimplifiedBlock

__all__ = ["InheritanceError", "Source", "TableRow", "WeightTable", "load_weights", "state_of"]

INHERITED, TRAINS, NEW, DIFFERS = "inherited", "inherited, trains", "new", "shape differs"
STARTED = "initialised"  # a simplified block that starts from another kind of block in the source; it trains
LOADED, RESIZED, LEFT = "loaded", "resized", "left in the source"
STATUSES = (INHERITED, TRAINS, STARTED, LOADED, RESIZED, NEW, DIFFERS, LEFT)
TAG = "open_clip:"
COUNTERS = "num_batches_tracked"  # old checkpoints lack it
_ENOUGH = 0.1  # the source has another architecture if a smaller share of its (or the model's) tensors fit

Source = str | os.PathLike[str] | nn.Module | Mapping[str, Any]


class InheritanceError(InputError):
    """Error for a source whose weights the model cannot take, or for a name that the model does not have."""


@dataclass(frozen=True)
class TableRow:
    """A row of the table: a largest module whose tensors all have this status, or a single tensor."""

    module: str
    status: str
    parameters: int  # without those that an earlier row counts


@dataclass(frozen=True)
class WeightTable:
    """A table of the model's modules with the status of their weights, and the sources of the weights."""

    rows: tuple[TableRow, ...]
    sources: tuple[str, ...]

    title = "weights from"

    @property
    def totals(self) -> dict[str, int]:
        """Parameters by status."""
        totals = dict.fromkeys(STATUSES, 0)
        for row in self.rows:
            totals[row.status] += row.parameters
        return totals

    def lines(self) -> list[str]:
        """The table and the parameters by status, as lines of text."""
        cells = [("module", "weights", "parameters")]
        cells += [(row.module or "(all)", row.status, f"{row.parameters:,}") for row in self.rows]
        cells += [("total", status, f"{count:,}") for status, count in self.totals.items() if count]
        name, status = (max(len(row[i]) for row in cells) for i in (0, 1))
        return [
            f"{self.title} {', '.join(self.sources)}",
            *(f"{row[0]:<{name}}  {row[1]:<{status}}  {row[2]:>12}" for row in cells),
        ]

    def __str__(self) -> str:
        return "\n".join(self.lines())


@dataclass(eq=False)
class Unit:
    """Tensors that are taken together or not at all: of a module whose submodules have no tensors, or a single tensor."""

    path: str
    tensors: dict[str, Tensor] = field(default_factory=dict)  # by full name
    leaf: bool = False
    block: str = ""  # the path of the simplified block that contains the unit
    status: str = NEW
    taken: dict[str, Tensor] = field(default_factory=dict)

    def free(self, state: Mapping[str, Tensor]) -> bool:
        """Whether the unit's names mean the same in `state`: a simplified block's do if `state` has a simplified one."""
        return not self.block or f"{self.block}.qk.weight" in state

    def fits(self, state: Mapping[str, Tensor]) -> bool:
        theirs = {n for n in state if n.startswith(f"{self.path}.")} if self.leaf else self.tensors.keys() & state.keys()
        return not self.differs(state) and all(n.endswith(COUNTERS) for n in self.tensors.keys() ^ theirs)

    def differs(self, state: Mapping[str, Tensor]) -> bool:
        return any(n in state and not alike(t, state[n]) for n, t in self.tensors.items())


def units_of(model: nn.Module) -> Iterator[Unit]:
    blocks = [f"{path}." for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, SimplifiedBlock)]
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        buffers = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        own = {prefix + n: t for n, t in {**module._parameters, **buffers}.items() if t is not None}
        block = next((block[:-1] for block in blocks if prefix.startswith(block)), "")
        rest = (t for child in module.children() for t in (*child.parameters(), *child.buffers()))
        if own and path and next(rest, None) is None:
            yield Unit(path, own, True, block)
        else:
            yield from (Unit(name, {name: tensor}, False, block) for name, tensor in own.items())


def rows_of(units: Iterable[Unit]) -> Iterator[TableRow]:
    """Yields the rows of a table. `units` must be in the order of their paths."""
    seen: set[int] = set()

    def split(path: str, inside: list[Unit]) -> Iterator[TableRow]:
        statuses = {unit.status for unit in inside}
        if len(statuses) == 1:
            counted = ((unit.status, t) for unit in inside for t in unit.tensors.values())
            parameters = {id(t): t for status, t in counted if status == LEFT or isinstance(t, nn.Parameter)}
            yield TableRow(path, statuses.pop(), sum(t.numel() for key, t in parameters.items() if key not in seen))
            seen.update(parameters)
            return
        depth = path.count(".") + 1 if path else 0
        for name, children in groupby(inside, lambda unit: ".".join(unit.path.split(".")[: depth + 1])):
            yield from split(name, list(children))

    yield from split("", list(units))


def check_enough(units: list[Unit], state: Mapping[str, Tensor], label: str, fitting: int, wanted: int) -> None:
    """Raises InheritanceError if too few tensors fit for a model of the same architecture."""
    if fitting >= max(1, _ENOUGH * min(len(state), wanted)):
        return
    ours = {name: tensor for unit in units for name, tensor in unit.tensors.items()}
    shapes = [n for n in state if n in ours and not alike(ours[n], state[n])][:2]
    missing = [n for n in state if n not in ours][:2]
    reasons = [f"{n} is {list(state[n].shape)} in the source and {list(ours[n].shape)} in the model" for n in shapes]
    for name in missing:
        near = difflib.get_close_matches(name, ours, 1, 0.0)
        reasons.append(f"{name} is not in the model" + (f" (nearest: {near[0]})" if near else ""))
    raise InheritanceError(
        f"source: expected weights of this model's architecture, got {label}, of whose {len(state)} tensors {fitting} fit"
        + "".join(f"; {reason}" for reason in reasons)
    )


def alike(ours: Tensor, theirs: Tensor) -> bool:
    """Whether shape and kind of number are the same. A scalar may be [] or [1], since checkpoints differ in that shape."""
    scalar = ours.numel() == theirs.numel() == 1 and max(ours.dim(), theirs.dim()) <= 1
    return (ours.shape == theirs.shape or scalar) and ours.is_floating_point() == theirs.is_floating_point()


def drop_half_tied(units: list[Unit]) -> None:
    """Resets units that own the same tensor, unless all of them take the same value for the tensor."""
    owners: dict[int, list[tuple[Unit, str]]] = defaultdict(list)
    for unit in units:
        for name, tensor in unit.tensors.items():
            owners[id(tensor)].append((unit, name))
    changed = True
    while changed:
        changed = False
        for tied in owners.values():
            taking = [unit for unit, _ in tied if unit.taken]
            values = [unit.taken[name] for unit, name in tied if name in unit.taken]
            if taking and (len(taking) < len(tied) or not all(torch.equal(values[0], value) for value in values[1:])):
                for unit, _ in tied:
                    unit.taken, unit.status = {}, NEW
                changed = True


def load_weights(model: nn.Module, source: Source) -> WeightTable:
    """Copies into ``model``, in place, every tensor of ``source`` whose name and shape the model has. Nothing is frozen.

    Positional embeddings of another image size or context length are interpolated: over the grid of the image (bicubic, its
    prefix tokens kept) or along the text (linear), as open_clip does. Tensors in a `SimplifiedBlock` are taken from a
    simplified block alone, since equal names may have another meaning. A tensor that modules of the model share is taken if
    the source has one value for it.

    Args:
        model: any model of this library or of open_clip.
        source: as for `inherit`; also the folder of a run or of an export.

    Returns:
        A table of what was loaded, resized, new, of another shape, and left in the source.

    Raises InheritanceError or FileNotFoundError, as `inherit` does, and then leaves the model unchanged.
    """
    label, state = state_of(source, model)
    units = [Unit(name, {name: t}, block=unit.block) for unit in units_of(model) for name, t in unit.tensors.items()]
    for unit in units:
        ((name, ours),) = unit.tensors.items()
        if name not in state or not unit.free(state):
            continue
        found = state[name] if alike(ours, state[name]) else _resized(model, name, ours, state[name])
        if found is None:
            unit.status = DIFFERS
        else:
            unit.status, unit.taken = LOADED if found is state[name] else RESIZED, {name: found}
    drop_half_tied(units)
    taken = {name for unit in units for name in unit.taken}
    check_enough(units, state, label, len(taken), len(units))
    copy(units)
    left = [Unit(name, {name: tensor}, status=LEFT) for name, tensor in state.items() if name not in taken]
    return WeightTable((*rows_of(units), *(rows_of(left) if left else ())), (label,))


def copy(units: Iterable[Unit]) -> None:
    """Copies the tensors that the units take into the tensors of the model."""
    with torch.no_grad():
        for unit in units:
            for name, value in unit.taken.items():
                unit.tensors[name].copy_(value.reshape(unit.tensors[name].shape))


def _resized(model: nn.Module, name: str, ours: Tensor, theirs: Tensor) -> Tensor | None:
    """Resizes a positional embedding [..., tokens, C] to the shape of `ours`; returns None for other tensors."""
    plain = name.rpartition(".")[2] in ("positional_embedding", "pos_embed", "pos_embedding")
    if not plain or ours.shape[:-2] != theirs.shape[:-2] or ours.shape[-1] != theirs.shape[-1]:
        return None
    old, new = theirs.reshape(1, -1, theirs.shape[-1]).float(), ours.numel() // ours.shape[-1]
    if not name.startswith("visual."):
        found = nn.functional.interpolate(old.mT, size=new, mode="linear").mT
        return found.reshape(ours.shape).to(theirs.dtype)
    visual: Any = model.visual
    grid = visual.grid_size if hasattr(visual, "grid_size") else visual.trunk.patch_embed.grid_size
    prefix = new - math.prod(grid)
    side = math.isqrt(max(0, old.shape[1] - prefix))
    if prefix < 0 or side * side != old.shape[1] - prefix or not side:
        return None
    found = resample_abs_pos_embed(old, list(grid), [side, side], num_prefix_tokens=prefix)
    return found.reshape(ours.shape).to(theirs.dtype)


def state_of(source: Source, model: nn.Module) -> tuple[str, dict[str, Tensor]]:
    """Returns the label of a source (as `inherit` takes it), and the source's tensors by their names in `model`."""
    prefixes: Mapping[str, str] | None = None  # prefix in the source -> prefix in the model; other names are ignored
    if isinstance(source, str) and source in packaged.SOURCES and not Path(source).exists():
        prefixes = getattr(model, "origins", {}).get(source)
        if prefixes is None:
            known = ", ".join(getattr(model, "origins", {})) or "none by name"
            raise InheritanceError(f"source: expected weights that this model takes ({known}), got {source!r}")
        label, state = source, packaged.SOURCES[source]()
    elif isinstance(source, nn.Module):
        label, state = type(source).__name__, source.state_dict()
    elif isinstance(source, Mapping):
        label, state = "the state dict", source
    elif isinstance(source, str | os.PathLike):
        label, state = str(source), _read(source)
    else:
        raise TypeError(f"source: expected a module, a state dict, a path or a name, got {type(source).__name__}")
    state = {name: value for name, value in bare_state(state).items() if isinstance(value, Tensor)}
    if not state:
        raise InheritanceError(f"source: expected weights, got {label}, which has no tensors")
    if prefixes is not None:
        pairs = [(theirs, ours, n) for n in state for theirs, ours in prefixes.items() if n.startswith(theirs)]
        state = {ours + name.removeprefix(theirs): state[name] for theirs, ours, name in pairs}
        if not state:
            raise InheritanceError(f"source: expected names that begin with {' or '.join(prefixes)}, got none in {label}")
    if hasattr(model, "text"):
        state = from_published(model, state)
        state = convert_to_custom_text_state_dict(convert_state_dict(model, state))
    return label, state


def _read(source: str | os.PathLike[str]) -> Mapping[str, Any]:
    path = _file_in(Path(source)) if Path(source).is_dir() else Path(source)
    name, slash, tag = str(source).removeprefix(TAG).partition("/")
    if not path.is_file() and slash and (str(source).startswith(TAG) or name in open_clip.list_models()):
        return _download(name, tag)
    if not path.is_file():
        raise FileNotFoundError(
            f"source: expected a file, open_clip's NAME/TAG or one of {', '.join(packaged.SOURCES)}, got {path}"
            + where_to_get(path)
        )
    state = read_weights(path, InheritanceError, "source: expected weights, readable without running code")
    if not isinstance(state, Mapping):
        raise InheritanceError(f"source: expected a state dict in {path}, got {type(state).__name__}")
    return {**bare_state(state), **state.get("ema", {})}  # of a run: with its averages, if it has some


def _file_in(folder: Path) -> Path:
    """Returns the file of weights in the folder of a run or of an export."""
    found = [path for name in ("last.pt", "*.safetensors", "*.pt", "*.bin") for path in sorted(folder.glob(name))]
    if not found:
        raise FileNotFoundError(f"source: expected the folder of a run or of an export with weights for torch, got {folder}")
    return found[0]


def _download(name: str, tag: str) -> Mapping[str, Any]:
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags:
        near = difflib.get_close_matches(tag, tags, 5, 0.0) or difflib.get_close_matches(name, open_clip.list_models(), 3)
        known = f"nearest tags: {', '.join(near)}" if tags else f"it has no tags for {name}; nearest models: {near}"
        raise InheritanceError(f"source: expected open_clip's NAME/TAG, got {name}/{tag}; {known}")
    try:
        return open_clip.create_model(name, pretrained=tag).state_dict()
    except (OSError, RuntimeError) as error:
        raise InheritanceError(f"source: open_clip could not get {name}/{tag}: {first_line(error)}") from None
