"""What a model takes from other models' weights: `Transfer` compares, takes what fits, copies."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import accumulate, groupby
from typing import Any

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from simplclip.models.weights import CheckpointError
from simplclip.nn import SimplifiedBlock

_COUNTERS = "num_batches_tracked"  # old checkpoints lack it
_SCALES = ("logit_scale", "logit_bias")  # ends of names; they always train
# the source has another architecture if a smaller share of its (or the model's) tensors fit
_ENOUGH = 0.1


class Status(StrEnum):
    """Where the weights of a module come from."""

    INHERITED = "inherited"
    TRAINS = "inherited, trains"
    # a simplified block that starts from another kind of block in the source; it trains
    STARTED = "initialised"
    RESIZED = "resized"  # a positional embedding, interpolated; it trains
    NEW = "new"
    DIFFERS = "shape differs"


@dataclass(frozen=True)
class WeightTable:
    """The status of a model's weights, and their sources.

    rows: a module whose tensors all have one status, as large as there is, or a single tensor ->
        the status, and the number of parameters without those that an earlier row counts.
    """

    rows: Mapping[str, tuple[Status, int]]
    sources: Sequence[str]

    @property
    def names(self) -> list[str]:
        """Names of the frozen modules and parameters, as `freeze` takes them."""
        return [name for name, (status, _) in self.rows.items() if status == Status.INHERITED]

    def status(self, tensor: str) -> Status:
        """Returns the status of a tensor of the model's state dict, by its name."""
        paths = ("", *accumulate(tensor.split("."), "{}.{}".format))
        return next(self.rows[path][0] for path in paths if path in self.rows)

    def __str__(self) -> str:
        """Returns the table as text: a line for each row, totals by status, the sources above."""
        totals = dict.fromkeys(Status, 0)
        for status, count in self.rows.values():
            totals[status] += count
        cells = [("module", "weights", "parameters")]
        for name, (status, count) in self.rows.items():
            cells.append((name or "(all)", status, f"{count:,}"))
        for status, count in totals.items():
            if count:
                cells.append(("total", status, f"{count:,}"))
        width = max(len(name) for name, *_ in cells)
        table = [f"{name:<{width}}  {status:<17}  {count:>12}" for name, status, count in cells]
        return "\n".join([f"weights from {', '.join(self.sources)}", *table])


@dataclass
class Match:
    """How a source fits the units of a model, see `Transfer`."""

    state: dict[str, Tensor]  # the source's, with positional embeddings in the model's size
    resized: set[str]  # names of the tensors that were interpolated for it
    comparable: list[str] = field(default_factory=list)  # units whose names mean the same there
    fitting: list[str] = field(default_factory=list)  # those whose tensors all fit
    differing: list[str] = field(default_factory=list)  # those with a tensor of another shape


class Transfer:
    """The tensors of a model, and what they take from sources.

    units: path -> names of the tensors that are taken together or not at all: those of a module
        whose submodules have no tensors, or a single tensor.
    blocks: unit -> the path of the simplified block that contains it, or "".
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self.units: dict[str, list[str]] = {}
        for path, group in groupby(self.tensors, lambda name: name.rpartition(".")[0]):
            names = list(group)
            leaf = path and sum(name.startswith(f"{path}.") for name in self.tensors) == len(names)
            if leaf:
                self.units[path] = names
            else:
                self.units |= {name: [name] for name in names}
        simplified = [
            path
            for path, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, SimplifiedBlock)
        ]
        self.blocks = {unit: _block_of(unit, simplified) for unit in self.units}
        self.status = dict.fromkeys(self.units, Status.NEW)
        self.taken: dict[str, Tensor] = {}

    def is_taken(self, unit: str) -> bool:
        """Whether a unit has tensors from a source."""
        return self.units[unit][0] in self.taken

    def reset(self, unit: str, status: Status = Status.NEW) -> None:
        """Sets a unit's status and forgets the tensors that it took; the model stays as it is."""
        self.status[unit] = status
        for name in self.units[unit]:
            self.taken.pop(name, None)

    def take(self, state: dict[str, Tensor], label: str) -> None:
        """Notes the tensors of each unit that fits and has none from an earlier source.

        state: the source's tensors by the model's names. label: the source, for errors. The model
        changes only in `copy`. A resized positional embedding gives way to an exact one.
        """
        match = self._match(state)
        self._check_enough(match, label)
        self._apply(match)

    def _match(self, state: dict[str, Tensor]) -> Match:
        """Compares the tensors of a source with those of the model; takes nothing."""
        resized: dict[str, Tensor] = {}
        differing: set[str] = set()
        for name, tensor in self.tensors.items():
            if name not in state or _alike(tensor, state[name]):
                continue
            value = _resized(self.model, name, tensor, state[name])
            if value is None:
                differing.add(name)
            else:
                resized[name] = value
        match = Match(state | resized, set(resized))
        for unit, block in self.blocks.items():
            # Names in a simplified block mean the same in the source's block if it is simplified.
            if block and f"{block}.qk.weight" not in state:
                continue
            match.comparable.append(unit)
            if not differing.isdisjoint(self.units[unit]):
                match.differing.append(unit)
            elif self._is_whole(unit, match.state):
                match.fitting.append(unit)
        return match

    def _check_enough(self, match: Match, label: str) -> None:
        """Raises CheckpointError if too few tensors fit for a model of the same architecture."""
        state = match.state
        comparable = self._names(match.comparable)
        fitting = self._names(match.fitting)
        count = sum(name in state and name not in match.resized for name in fitting)
        if count >= max(1, _ENOUGH * min(len(state), len(comparable))):
            return
        unfit = [name for name in state if name not in fitting]
        examples = ", ".join(unfit[:3]) or "it has none"
        raise CheckpointError(
            "source: expected weights of this model's architecture, got "
            f"{label}, of whose {len(state)} tensors {count} fit (not: {examples})"
        )

    def _names(self, units: list[str]) -> list[str]:
        """Returns the names of the tensors in these units, but for logit scale and bias."""
        return [name for unit in units if not unit.endswith(_SCALES) for name in self.units[unit]]

    def _apply(self, match: Match) -> None:
        """Takes the units that fit into `taken`, and notes the status of those of another shape."""
        for unit in match.differing:
            if not self.is_taken(unit):
                self.status[unit] = Status.DIFFERS
        for unit in match.fitting:
            names = self.units[unit]
            resized = not match.resized.isdisjoint(names)
            # an exact embedding of a later source is better than a resized one
            better = self.status[unit] == Status.RESIZED and not resized
            if self.is_taken(unit) and not better:
                continue
            for name in names:
                self.taken[name] = match.state.get(name, self.tensors[name])
            if resized:
                self.status[unit] = Status.RESIZED
            elif self.blocks[unit] or unit.endswith(_SCALES):
                self.status[unit] = Status.TRAINS
            else:
                self.status[unit] = Status.INHERITED

    def _is_whole(self, unit: str, state: Mapping[str, Tensor]) -> bool:
        """Whether `state` has the names of a unit and no others in it, counters of norms aside."""
        if unit in self.tensors:
            present = {unit} & state.keys()
        else:
            present = {name for name in state if name.startswith(f"{unit}.")}
        unequal = present.symmetric_difference(self.units[unit])
        return all(name.endswith(_COUNTERS) for name in unequal)

    def drop_half_tied(self) -> None:
        """Resets units that own the same tensor, unless all of them take the same value for it."""
        owners: dict[int, list[tuple[str, str]]] = defaultdict(list)
        for unit, names in self.units.items():
            for name in names:
                owners[id(self.tensors[name])].append((unit, name))
        for tied in owners.values():
            values = [self.taken[name] for _, name in tied if name in self.taken]
            if not values:
                continue
            equal = all(torch.equal(values[0], value) for value in values[1:])
            if len(values) < len(tied) or not equal:
                for unit, _ in tied:
                    self.reset(unit)

    @torch.no_grad()
    def copy(self, labels: Sequence[str]) -> WeightTable:
        """Copies what the units take into the model, in place; `labels` name the sources."""
        for name, value in self.taken.items():
            self.tensors[name].copy_(value.reshape(self.tensors[name].shape))
        counted: set[Tensor] = set()

        def rows(path: str, inside: list[str]) -> Iterator[tuple[str, tuple[Status, int]]]:
            """Yields rows for the units inside `path`; their tensors become `counted`."""
            if len({self.status[unit] for unit in inside}) == 1:
                tensors = {self.tensors[name] for unit in inside for name in self.units[unit]}
                tensors -= counted
                counted.update(tensors)
                size = sum(tensor.numel() for tensor in tensors if isinstance(tensor, nn.Parameter))
                yield path, (self.status[inside[0]], size)
                return
            depth = path.count(".") + 2 if path else 1
            for child, units in groupby(inside, lambda unit: ".".join(unit.split(".")[:depth])):
                yield from rows(child, list(units))

        return WeightTable(dict(rows("", list(self.units))), labels)


def _block_of(unit: str, blocks: list[str]) -> str:
    """Returns the path of the block that contains a unit, or an empty string."""
    return next((block for block in blocks if unit.startswith(f"{block}.")), "")


def _resized(model: nn.Module, name: str, target: Tensor, value: Tensor) -> Tensor | None:
    """Returns a positional embedding in the target's shape; None for what cannot be resized."""
    if name.rpartition(".")[2] not in ("positional_embedding", "pos_embed", "pos_embedding"):
        return None
    if target.shape[:-2] != value.shape[:-2] or target.shape[-1] != value.shape[-1]:
        return None
    old = value.reshape(1, -1, value.shape[-1]).float()
    tokens = target.numel() // target.shape[-1]
    if not name.startswith("visual."):
        new = nn.functional.interpolate(old.mT, size=tokens, mode="linear").mT
        return new.reshape(target.shape).to(value.dtype)
    patches: Any = model.visual
    if not hasattr(patches, "grid_size"):  # timm's trunk
        patches = getattr(getattr(patches, "trunk", None), "patch_embed", None)
    grid: Any = getattr(patches, "grid_size", None)
    if not grid:
        return None
    prefix = tokens - math.prod(grid)
    side = math.isqrt(max(0, old.shape[1] - prefix))
    if prefix < 0 or side * side != old.shape[1] - prefix or not side:
        return None
    new = resample_abs_pos_embed(old, list(grid), [side, side], num_prefix_tokens=prefix)
    return new.reshape(target.shape).to(value.dtype)


def _alike(target: Tensor, value: Tensor) -> bool:
    """Whether two tensors have the same shape, where [] is [1], and both or neither floating."""
    if target.is_floating_point() != value.is_floating_point():
        return False
    scalar = target.numel() == value.numel() == 1 and max(target.dim(), value.dim()) <= 1
    return scalar or target.shape == value.shape
