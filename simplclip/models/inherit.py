"""Weights from other models: `inherit` copies and freezes modules that a student shares with a
teacher or pretrained model, `freeze` only freezes.

    model = simplclip.models.create("siclip2-s0")
    print(simplclip.inherit(model, "MobileCLIP2-S0/dfndr2b"))

No tensor in a frozen prefix of a tower requires a gradient, so autograd keeps none of its
activations: arXiv 2411.14789.
"""

from __future__ import annotations

import difflib
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from functools import partial
from itertools import accumulate, groupby
from operator import attrgetter
from typing import Any

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from simplclip.common.errors import InputError
from simplclip.models import init_blocks
from simplclip.models.weights import CheckpointError, Source, state_of
from simplclip.nn import SimplifiedBlock
from simplclip.ops import checks

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

    rows: a largest module whose tensors all have this status, or a single tensor -> the status, and
    the number of parameters
        without those that an earlier row counts.
    """

    rows: Mapping[str, tuple[Status, int]]
    sources: Sequence[str]

    @property
    def names(self) -> list[str]:
        """Names of the frozen modules and parameters, as `freeze` takes them."""
        return [name for name, (status, _) in self.rows.items() if status == Status.INHERITED]

    def __str__(self) -> str:
        totals = dict.fromkeys(Status, 0)
        for status, count in self.rows.values():
            totals[status] += count
        cells = [("module", "weights", "parameters")]
        cells += [
            (name or "(all)", status, f"{count:,}") for name, (status, count) in self.rows.items()
        ]
        cells += [("total", status, f"{count:,}") for status, count in totals.items() if count]
        width = max(len(name) for name, *_ in cells)
        table = [f"{name:<{width}}  {status:<17}  {count:>12}" for name, status, count in cells]
        return "\n".join([f"weights from {', '.join(self.sources)}", *table])


class Transfer:
    """The tensors of a model, and what they take from sources.

    units: path -> names of the tensors that are taken together or not at all: of a module whose
    submodules have no tensors,
        or a single tensor.
    blocks: unit -> the path of the simplified block that contains it, or "".
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self.units: dict[str, list[str]] = {}
        for path, group in groupby(self.tensors, lambda name: name.rpartition(".")[0]):
            names = list(group)
            leaf = path and sum(name.startswith(f"{path}.") for name in self.tensors) == len(names)
            self.units |= {path: names} if leaf else {name: [name] for name in names}
        simplified = [
            path
            for path, m in model.named_modules(remove_duplicate=False)
            if isinstance(m, SimplifiedBlock)
        ]
        self.blocks = {
            unit: next((b for b in simplified if unit.startswith(f"{b}.")), "")
            for unit in self.units
        }
        self.status = dict.fromkeys(self.units, Status.NEW)
        self.taken: dict[str, Tensor] = {}

    def is_taken(self, unit: str) -> bool:
        return self.units[unit][0] in self.taken

    def reset(self, unit: str, status: Status = Status.NEW) -> None:
        self.status[unit] = status
        for name in self.units[unit]:
            self.taken.pop(name, None)

    def take(self, state: dict[str, Tensor], label: str) -> None:
        """Takes the tensors of each unit that fits and has none from an earlier source.

        Raises CheckpointError if too few tensors fit for a model of the same architecture.
        """
        differing = {
            name
            for name in self.tensors
            if name in state and not _alike(self.tensors[name], state[name])
        }
        interpolated = {
            name: _resized(self.model, name, self.tensors[name], state[name]) for name in differing
        }
        resized = {name: value for name, value in interpolated.items() if value is not None}
        state, differing = state | resized, differing - resized.keys()
        # In a simplified block the names mean the same if the source has a simplified block there.
        free = [
            unit
            for unit, block in self.blocks.items()
            if not block or f"{block}.qk.weight" in state
        ]
        fitting = [
            unit
            for unit in free
            if self._is_whole(unit, state) and differing.isdisjoint(self.units[unit])
        ]
        wanted, fit = (
            [n for u in part if not u.endswith(_SCALES) for n in self.units[u]]
            for part in (free, fitting)
        )
        count = sum(name in state and name not in resized for name in fit)
        if count < max(1, _ENOUGH * min(len(state), len(wanted))):
            others = ", ".join([name for name in state if name not in fit][:3]) or "it has none"
            got = f"{label}, of whose {len(state)} tensors {count} fit (not: {others})"
            raise CheckpointError(
                f"source: expected weights of this model's architecture, got {got}"
            )
        for unit in free:
            exact = unit in fitting and not resized.keys() & self.units[unit]
            if self.is_taken(unit) and not (exact and self.status[unit] == Status.RESIZED):
                continue
            if unit in fitting:
                self.taken |= {
                    name: state.get(name, self.tensors[name]) for name in self.units[unit]
                }
                trains = self.blocks[unit] or unit.endswith(_SCALES)
                status = Status.TRAINS if trains else Status.INHERITED
                self.status[unit] = Status.RESIZED if resized.keys() & self.units[unit] else status
            elif not differing.isdisjoint(self.units[unit]):
                self.status[unit] = Status.DIFFERS

    def _is_whole(self, unit: str, state: Mapping[str, Tensor]) -> bool:
        """Whether a state dict has the names of a unit, and no others inside it."""
        present = (
            {unit} & state.keys()
            if unit in self.tensors
            else {n for n in state if n.startswith(f"{unit}.")}
        )
        return all(
            name.endswith(_COUNTERS) for name in present.symmetric_difference(self.units[unit])
        )

    def drop_half_tied(self) -> None:
        """Resets units that own the same tensor, unless all of them take the same value for the
        tensor.
        """
        owners: dict[int, list[tuple[str, str]]] = defaultdict(list)
        for unit, names in self.units.items():
            for name in names:
                owners[id(self.tensors[name])].append((unit, name))
        for tied in owners.values():
            values = [self.taken[name] for _, name in tied if name in self.taken]
            if values and (
                len(values) < len(tied)
                or not all(torch.equal(values[0], value) for value in values[1:])
            ):
                for unit, _ in tied:
                    self.reset(unit)

    @torch.no_grad()
    def copy(self, labels: Sequence[str]) -> WeightTable:
        """Copies what the units take into the model, and returns the table."""
        for name, value in self.taken.items():
            self.tensors[name].copy_(value.reshape(self.tensors[name].shape))
        counted: set[Tensor] = set()

        def rows(path: str, inside: list[str]) -> Iterator[tuple[str, tuple[Status, int]]]:
            if len({self.status[unit] for unit in inside}) == 1:
                tensors = {
                    self.tensors[name] for unit in inside for name in self.units[unit]
                } - counted
                counted.update(tensors)
                size = sum(tensor.numel() for tensor in tensors if isinstance(tensor, nn.Parameter))
                yield path, (self.status[inside[0]], size)
                return
            depth = path.count(".") + 1 if path else 0
            for name, children in groupby(
                inside, lambda unit: ".".join(unit.split(".")[: depth + 1])
            ):
                yield from rows(name, list(children))

        return WeightTable(dict(rows("", list(self.units))), labels)


def inherit(
    model: nn.Module,
    source: Source | Sequence[Source],
    *,
    train: str | Sequence[str] = (),
    blocks: str | None = None,
) -> WeightTable:
    """Copies every unchanged module of ``source`` into ``model``, in place, and freezes it there.

    A module is unchanged if the source has the same tensors under the same names in the same
    shapes. Positional embeddings of another image size or context length are interpolated, as
    open_clip does: over the grid of the image (bicubic, its prefix tokens kept) or along the text
    (linear). Modules in a `SimplifiedBlock` are copied from a simplified block alone, since equal
    names may have another meaning (FastViT's ``norm`` is a batch norm). These two are not frozen,
    and neither are ``logit_scale`` and ``logit_bias``. Frozen modules get no gradient and stay in
    eval mode even after ``model.train()``, so that norm statistics do not change. deepcopy and
    pickle keep this, while a state dict has only weights (see `freeze`).

    Args:
        source: a module; a state dict; a file of torch.save (a state dict, bare or under
            "state_dict" or "model", read with weights_only) or of safetensors; the folder of a run
            or of an export; ``NAME/TAG`` or ``open_clip:NAME/TAG`` for weights that open_clip
            downloads; or, for siclip-lite0, a name in `sources.PACKAGED`. If several sources fit a
            module, the first one is used.
        train: patterns (fnmatch, ``*`` matches dots too) of modules or tensors that are copied but
            not frozen. A pattern that matches a module applies to everything in it; one that
            matches a tensor applies to its whole module. With "*" nothing is frozen.
        blocks: None, or how simplified blocks that were not copied start from the source's blocks
            in their places, see `init_blocks`: a matrix that blocks share becomes the "average" of
            their matrices, or that of the "first" block. The first source with a block in a place
            is used. These blocks train.

    Returns a table of module, status and parameters, with the names of the frozen modules and
    parameters.

    Raises, and leaves the model unchanged:
        CheckpointError: the source has another architecture or cannot be read as weights.
        InputError: no source is given; a pattern matches nothing; or, with ``blocks``, the source
            has no block in the place of a simplified block, or one of another kind or shape.
        FileNotFoundError: there is no such file.
    """
    checks.instance("model", model, nn.Module, "an nn.Module")
    sources = [source] if isinstance(source, str | os.PathLike | nn.Module | Mapping) else source
    checks.instance(
        "source", sources, Sequence, "a module, a state dict, a path or name, or a list of them"
    )
    if not sources:
        raise InputError("source: expected at least one, got an empty list")
    transfer = Transfer(model)
    loaded = [state_of(each, model) for each in sources]
    for label, state in loaded:
        transfer.take(state, label)
    transfer.drop_half_tied()
    for pattern in [train] if isinstance(train, str) else train:
        matching = [
            unit for unit, names in transfer.units.items() if _matches(pattern, unit, names)
        ]
        if not matching:
            near = difflib.get_close_matches(pattern, transfer.units, 1, 0.3)
            raise InputError(
                f"train: expected a pattern that matches a module, got {pattern!r}; nearest: {near}"
            )
        transfer.status |= {
            unit: Status.TRAINS for unit in matching if transfer.status[unit] == Status.INHERITED
        }
    labels = [label for label, _ in loaded]
    if blocks is not None:
        _start_blocks(model, transfer, [state for _, state in loaded], ", ".join(labels), blocks)
    table = transfer.copy(labels)
    freeze(model, table.names)
    return table


def _start_blocks(
    model: nn.Module, transfer: Transfer, states: list[dict[str, Tensor]], label: str, merge: str
) -> None:
    """Starts the simplified blocks that were not copied: each from the first source with a block in
    its place.
    """
    simplified = {block for block in transfer.blocks.values() if block}
    if not simplified or merge not in init_blocks.MERGES:
        expected = f"one of {init_blocks.MERGES}, for a model with simplified blocks"
        raise InputError(f"blocks: expected {expected}, got {merge!r} for {len(simplified)} blocks")
    starts: dict[str, Any] = {}
    for path in dict.fromkeys(
        block for unit, block in transfer.blocks.items() if block and not transfer.is_taken(unit)
    ):
        blocks = (
            {n.removeprefix(f"{path}."): state[n] for n in state if n.startswith(f"{path}.")}
            for state in states
        )
        tensors = next((tensors for tensors in blocks if init_blocks.is_block(tensors)), None)
        if tensors is None:
            raise InputError(f"blocks: expected a source with a block {path}, got {label} without")
        starts[path] = model.get_submodule(path), tensors
    init_blocks.start(starts, merge)
    for unit, block in transfer.blocks.items():
        if block in starts:
            transfer.reset(unit, Status.STARTED)


def _resized(model: nn.Module, name: str, target: Tensor, value: Tensor) -> Tensor | None:
    """Returns a positional embedding [..., tokens, C] of another length in the shape of `target`;
    None for other tensors.
    """
    if name.rpartition(".")[2] not in ("positional_embedding", "pos_embed", "pos_embedding"):
        return None
    if target.shape[:-2] != value.shape[:-2] or target.shape[-1] != value.shape[-1]:
        return None
    old, tokens = value.reshape(1, -1, value.shape[-1]).float(), target.numel() // target.shape[-1]
    if not name.startswith("visual."):
        new = nn.functional.interpolate(old.mT, size=tokens, mode="linear").mT
        return new.reshape(target.shape).to(value.dtype)
    visual: Any = model.visual
    patches = (
        visual
        if hasattr(visual, "grid_size")
        else getattr(getattr(visual, "trunk", None), "patch_embed", None)
    )
    grid: Any = getattr(patches, "grid_size", None)
    prefix = tokens - math.prod(grid) if grid else -1
    side = math.isqrt(max(0, old.shape[1] - prefix))
    if prefix < 0 or side * side != old.shape[1] - prefix or not side:
        return None
    new = resample_abs_pos_embed(old, list(grid), [side, side], num_prefix_tokens=prefix)
    return new.reshape(target.shape).to(value.dtype)


def _alike(target: Tensor, value: Tensor) -> bool:
    """Whether shape and kind of number are the same.

    A scalar may be [] or [1], since checkpoints differ in that shape.
    """
    scalar = target.numel() == value.numel() == 1 and max(target.dim(), value.dim()) <= 1
    return (
        target.shape == value.shape or scalar
    ) and target.is_floating_point() == value.is_floating_point()


def _matches(pattern: str, unit: str, names: list[str]) -> bool:
    paths = accumulate(unit.split("."), "{}.{}".format)
    return any(fnmatchcase(name, pattern) for name in (*paths, *names))


def freeze(model: nn.Module, names: Iterable[str]) -> None:
    """Freezes modules and parameters by name, as `inherit` does: they get no gradient and stay in
    eval mode.

    Raises InputError for a name that the model does not have, and then leaves the model unchanged.
    """
    try:
        parts: list[Any] = [attrgetter(name)(model) if name else model for name in names]
    except (AttributeError, TypeError) as error:
        raise InputError(
            f"names: expected modules or parameters of the model, got others: {error}"
        ) from None
    for part in parts:
        part.requires_grad_(False)
        for module in part.modules() if isinstance(part, nn.Module) else ():
            _hold_in_eval(module)


def freeze_norms(model: nn.Module) -> None:
    """Keeps all batch norms in eval mode, so that their statistics do not change; weights and
    biases are trained.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            _hold_in_eval(module)


def is_frozen(module: nn.Module) -> bool:
    """Whether `freeze` froze all of a module: it has parameters, none gets a gradient, and it stays
    in eval mode.
    """
    parameters = list(module.parameters())
    held = all(
        getattr(vars(inner).get("train"), "func", None) is _eval_only for inner in module.modules()
    )
    return (
        held and bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
    )


def frozen_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules that are frozen, the largest that are frozen as one, with their names."""
    inside: tuple[str, ...] = ()  # beginnings of the names within those
    for name, module in model.named_modules():
        if not name.startswith(inside) and is_frozen(module):
            inside += (f"{name}." if name else "",)
            yield name, module


def _hold_in_eval(module: nn.Module) -> None:
    # `train` is an attribute of the instance: a subclass would change type(module), and with a
    # forward hook `training` would be wrong until the module runs. The partial of a module-level
    # function can be copied and pickled.
    module.train = partial(_eval_only, module)  # type: ignore[method-assign]
    module.eval()


def _eval_only(module: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(module, False)
