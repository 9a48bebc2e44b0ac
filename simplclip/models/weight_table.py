"""The tensors of a model as units that take weights from a source, and the table of what each unit took."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import groupby

import torch
from torch import Tensor, nn

from simplclip.models.weights import CheckpointError
from simplclip.nn import SimplifiedBlock

__all__ = ["InheritanceError", "Status", "TableRow", "Unit", "Units", "WeightTable", "alike"]

_COUNTERS = "num_batches_tracked"  # old checkpoints lack it
_ENOUGH = 0.1  # the source has another architecture if a smaller share of its (or the model's) tensors fit


class InheritanceError(CheckpointError):
    """Error for a source whose weights the model cannot take, or for a name that the model does not have."""


class Status(StrEnum):
    """Where the weights of a module come from."""

    INHERITED = "inherited"
    TRAINS = "inherited, trains"
    STARTED = "initialised"  # a simplified block that starts from another kind of block in the source; it trains
    LOADED = "loaded"
    RESIZED = "resized"
    NEW = "new"
    DIFFERS = "shape differs"


@dataclass(frozen=True)
class TableRow:
    """A row of the table: a largest module whose tensors all have this status, or a single tensor."""

    module: str
    status: Status
    parameters: int  # without those that an earlier row counts


@dataclass(frozen=True)
class WeightTable:
    """A table of the model's modules with the status of their weights, and the sources of the weights."""

    rows: tuple[TableRow, ...]
    sources: tuple[str, ...]

    title = "weights from"

    @property
    def totals(self) -> dict[Status, int]:
        """Parameters by status."""
        totals = dict.fromkeys(Status, 0)
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
    status: Status = Status.NEW
    taken: dict[str, Tensor] = field(default_factory=dict)

    @property
    def always_trains(self) -> bool:
        return self.path.rpartition(".")[2] in ("logit_scale", "logit_bias")

    def free(self, state: Mapping[str, Tensor]) -> bool:
        """Whether the unit's names mean the same in `state`: a simplified block's do if `state` has a simplified one."""
        return not self.block or f"{self.block}.qk.weight" in state

    def fits(self, state: Mapping[str, Tensor]) -> bool:
        names = {n for n in state if n.startswith(f"{self.path}.")} if self.leaf else self.tensors.keys() & state.keys()
        return not self.differs(state) and all(n.endswith(_COUNTERS) for n in self.tensors.keys() ^ names)

    def differs(self, state: Mapping[str, Tensor]) -> bool:
        return any(n in state and not alike(t, state[n]) for n, t in self.tensors.items())


class Units(list[Unit]):
    """The units of a model, in the order of their paths."""

    @classmethod
    def of(cls, model: nn.Module) -> Units:
        units = cls()
        blocks = [f"{path}." for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, SimplifiedBlock)]
        for path, module in model.named_modules(remove_duplicate=False):
            prefix = f"{path}." if path else ""
            buffers = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
            tensors = {prefix + n: t for n, t in {**module._parameters, **buffers}.items() if t is not None}
            block = next((block[:-1] for block in blocks if prefix.startswith(block)), "")
            inner = (t for child in module.children() for t in (*child.parameters(), *child.buffers()))
            if tensors and path and next(inner, None) is None:
                units.append(Unit(path, tensors, True, block))
            else:
                units += (Unit(name, {name: tensor}, False, block) for name, tensor in tensors.items())
        return units

    def split(self) -> Units:
        """Returns units of a single tensor each."""
        return Units(Unit(name, {name: tensor}, block=unit.block) for unit in self for name, tensor in unit.tensors.items())

    def take(self, state: Mapping[str, Tensor], label: str) -> None:
        """Sets `taken` of each unit that fits and has none from an earlier source, `status` of each whose shapes differ.

        Raises InheritanceError if too few tensors fit for a model of the same architecture.
        """
        free = [unit for unit in self if unit.free(state)]
        fitting = [unit for unit in free if unit.fits(state)]
        self._check_enough(state, label, fitting, free)
        for unit in free:
            if not unit.taken and unit in fitting:
                unit.taken = {name: state[name] for name in unit.tensors if name in state}
            elif not unit.taken and unit.differs(state):
                unit.status = Status.DIFFERS

    def _check_enough(self, state: Mapping[str, Tensor], label: str, fitting: list[Unit], free: list[Unit]) -> None:
        wanted, fit = ([n for unit in units if not unit.always_trains for n in unit.tensors] for units in (free, fitting))
        count = sum(name in state for name in fit)
        if count >= max(1, _ENOUGH * min(len(state), len(wanted))):
            return
        ours = {name: tensor for unit in self for name, tensor in unit.tensors.items()}
        reasons = [
            f"; {name} is {list(state[name].shape)} in the source and {list(ours[name].shape)} in the model"
            if name in ours
            else f"; {name} is not in the model (nearest: {difflib.get_close_matches(name, ours, 1, 0.0)[0]})"
            for name in [name for name in state if name not in fit][:3]
        ]
        got = f"{label}, of whose {len(state)} tensors {count} fit{''.join(reasons)}"
        raise InheritanceError(f"source: expected weights of this model's architecture, got {got}")

    def drop_half_tied(self) -> None:
        """Resets units that own the same tensor, unless all of them take the same value for the tensor."""
        owners: dict[int, list[tuple[Unit, str]]] = defaultdict(list)
        for unit in self:
            for name, tensor in unit.tensors.items():
                owners[id(tensor)].append((unit, name))
        for tied in owners.values():
            taking = [unit for unit, _ in tied if unit.taken]
            values = [unit.taken[name] for unit, name in tied if name in unit.taken]
            if 0 < len(taking) < len(tied) or not all(torch.equal(values[0], value) for value in values[1:]):
                for unit, _ in tied:
                    unit.taken, unit.status = {}, Status.NEW

    def copy_taken(self) -> None:
        """Copies the tensors that the units take into the tensors of the model."""
        with torch.no_grad():
            for unit in self:
                for name, value in unit.taken.items():
                    unit.tensors[name].copy_(value.reshape(unit.tensors[name].shape))

    def rows(self) -> tuple[TableRow, ...]:
        counted: set[int] = set()

        def split(path: str, inside: list[Unit]) -> Iterator[TableRow]:
            if len({unit.status for unit in inside}) == 1:
                parameters = {id(t): t for unit in inside for t in unit.tensors.values() if isinstance(t, nn.Parameter)}
                size = sum(t.numel() for key, t in parameters.items() if key not in counted)
                counted.update(parameters)
                yield TableRow(path, inside[0].status, size)
                return
            depth = path.count(".") + 1 if path else 0
            for name, children in groupby(inside, lambda unit: ".".join(unit.path.split(".")[: depth + 1])):
                yield from split(name, list(children))

        return tuple(split("", self))


def alike(target: Tensor, value: Tensor) -> bool:
    """Whether shape and kind of number are the same. A scalar may be [] or [1], since checkpoints differ in that shape."""
    scalar = target.numel() == value.numel() == 1 and max(target.dim(), value.dim()) <= 1
    return (target.shape == value.shape or scalar) and target.is_floating_point() == value.is_floating_point()
