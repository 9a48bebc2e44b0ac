"""Weight inheritance: a student copies and freezes the modules that it shares with a teacher or pretrained model.

    model = simplclip.models.create("siclip2-s0")
    print(simplclip.inherit(model, "MobileCLIP2-S0/dfndr2b"))

`inherit` copies and freezes; `freeze` only freezes, e.g. the names in `Inheritance.names` after loading a checkpoint. No
tensor in a frozen prefix of a tower requires a gradient, so autograd keeps none of its activations. Source: WIKD of arXiv
2411.14789.

Copied weights compute the same as in the source, except for RMSNorm's eps in blocks of He & Hofmann: see nn.SimplifiedBlock.
"""

import difflib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from itertools import accumulate, groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from simplclip.common import plugins
from simplclip.common.errors import InputError
from simplclip.models import warm
from simplclip.models.mobileclip import from_published, where_to_get
from simplclip.models.registry import bare_state, first_line, read_weights
from simplclip.nn import SimplifiedBlock

__all__ = ["Inheritance", "InheritanceError", "TableRow", "freeze", "freeze_norms", "inherit", "is_frozen"]

INHERITED, TRAINS, NEW, DIFFERS = "inherited", "inherited, trains", "new", "shape differs"
STARTED = "initialised"  # a simplified block from the source's block, which has other tensors; it trains
ALWAYS_TRAIN = ("logit_scale", "logit_bias")
TAG = "open_clip:"
_COUNTERS = "num_batches_tracked"  # old checkpoints lack it
_ENOUGH = 0.1  # the source has another architecture if a smaller share of its (or the model's) tensors fit

Source = str | os.PathLike[str] | nn.Module | Mapping[str, Any]


class InheritanceError(InputError):
    """The model cannot inherit from the source, or does not have a name."""


@dataclass(frozen=True)
class TableRow:
    """A row of the table: a module whose tensors all have this status, in no larger such module; or a single tensor."""

    module: str
    status: str
    parameters: int  # without those that an earlier row counts


@dataclass(frozen=True)
class Inheritance:
    """What `inherit` did: a table of the model, and the sources of the weights."""

    rows: tuple[TableRow, ...]
    sources: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """Names of the frozen modules and parameters, as `freeze` takes them."""
        return [row.module for row in self.rows if row.status == INHERITED]

    @property
    def totals(self) -> dict[str, int]:
        """Parameters by status."""
        totals = dict.fromkeys((INHERITED, TRAINS, STARTED, NEW, DIFFERS), 0)
        for row in self.rows:
            totals[row.status] += row.parameters
        return totals

    def lines(self) -> list[str]:
        """The table and the parameters by status, as lines of text."""
        cells = [("module", "weights", "parameters")]
        cells += [(row.module or "(all)", row.status, f"{row.parameters:,}") for row in self.rows]
        cells += [("total", status, f"{count:,}") for status, count in self.totals.items() if count]
        width = max(len(name) for name, _, _ in cells)
        return [
            f"inherited from {', '.join(self.sources)}",
            *(f"{name:<{width}}  {status:<17}  {count:>12}" for name, status, count in cells),
        ]

    def __str__(self) -> str:
        return "\n".join(self.lines())


@dataclass(eq=False)
class _Unit:
    """What is inherited as a whole or not at all: a module whose submodules have no tensors, or a single tensor."""

    path: str
    tensors: dict[str, Tensor] = field(default_factory=dict)  # by full name
    leaf: bool = False
    simplified: bool = False
    status: str = NEW
    taken: dict[str, Tensor] = field(default_factory=dict)

    @property
    def always_trains(self) -> bool:
        return self.path.rpartition(".")[2] in ALWAYS_TRAIN

    def fits(self, state: Mapping[str, Tensor]) -> bool:
        theirs = {n for n in state if n.startswith(f"{self.path}.")} if self.leaf else self.tensors.keys() & state.keys()
        return not self.differs(state) and all(n.endswith(_COUNTERS) for n in self.tensors.keys() ^ theirs)

    def differs(self, state: Mapping[str, Tensor]) -> bool:
        return any(n in state and not _alike(t, state[n]) for n, t in self.tensors.items())


def inherit(
    model: nn.Module,
    source: Source | Sequence[Source],
    *,
    train: str | Sequence[str] = (),
    blocks: str | None = None,
) -> Inheritance:
    """Copy every unchanged module of ``source`` into ``model``, in place, and freeze it there.

    A module is unchanged if the source has the same tensors under the same names in the same shapes. Modules in a
    `SimplifiedBlock` never are, since equal names may have another meaning (FastViT's ``norm`` is a batch norm). Frozen
    modules get no gradient and stay in eval mode even after ``model.train()``, so that norm statistics do not change.
    deepcopy and pickle keep this, while a state dict has only weights (see `freeze`). ``logit_scale`` and ``logit_bias``
    are copied but not frozen.

    Args:
        model: the student.
        source: a module; a state dict; a file of torch.save (a state dict, bare or under "state_dict" or "model", read
            with weights_only) or of safetensors; ``NAME/TAG`` or ``open_clip:NAME/TAG`` for weights that open_clip
            downloads; or the name of registered weights, e.g. efficientnet-lite0, if ``model.origins`` has it. If several
            sources fit a module, the first one is used.
        train: patterns (fnmatch, ``*`` matches dots too) of modules or tensors that are copied but not frozen. A pattern
            that matches a module applies to everything in it; one that matches a tensor applies to its whole module.
        blocks: None, or how simplified blocks start from the source's blocks in their places, see `warm.convert`: a matrix
            that they share is the "average" of the folded matrices, or that of the "first" block. They train. Of several
            sources, the first one with a block in that place gives it.

    Returns:
        A table of module, status and parameters, with the names of what is frozen.

    Raises:
        InheritanceError: the source has no tensors, has another architecture or cannot be read as weights, or a pattern
            matches nothing; or, with ``blocks``, it has no block in the place of a simplified block, or one of another kind
            or shape.
        FileNotFoundError: there is no such file. In all cases the model is left unchanged.
    """
    sources = [source] if isinstance(source, str | os.PathLike | nn.Module | Mapping) else list(source)
    if not sources:
        raise InheritanceError("source: expected at least one, got an empty list")
    patterns = [train] if isinstance(train, str) else list(train)
    units = list(_units(model))
    labels, states = list[str](), list[dict[str, Tensor]]()
    for one in sources:
        label, state = _state_of(one, model)
        labels.append(label)
        states.append(state)
        _take(units, state, label)
    _drop_half_tied(units)
    for pattern in patterns:
        hit = [unit for unit in units if _matches(pattern, unit)]
        if not hit:
            near = difflib.get_close_matches(pattern, [unit.path for unit in units], 1, 0.3)
            raise InheritanceError(f"train: expected a pattern that matches a module, got {pattern!r}; nearest: {near}")
        for unit in hit:
            unit.status = TRAINS if unit.taken else unit.status
    if blocks is not None:
        _start_blocks(model, units, states, ", ".join(labels), blocks)
    with torch.no_grad():
        for unit in units:
            for name, value in unit.taken.items():
                unit.tensors[name].copy_(value.reshape(unit.tensors[name].shape))
    result = Inheritance(tuple(_rows(units)), tuple(labels))
    freeze(model, result.names)
    return result


def _start_blocks(model: nn.Module, units: list[_Unit], states: list[dict[str, Tensor]], label: str, merge: str) -> None:
    """Start the simplified blocks from the blocks of the first source that has them."""
    found: dict[str, tuple[SimplifiedBlock, dict[str, Tensor]]] = {}
    for path, block in model.named_modules():
        if isinstance(block, SimplifiedBlock):
            theirs = ({n.removeprefix(f"{path}."): state[n] for n in state if n.startswith(f"{path}.")} for state in states)
            tensors = next((tensors for tensors in theirs if warm.is_block(tensors)), None)
            if tensors is None:
                raise InheritanceError(f"blocks: expected a source with a block {path}, got {label} without")
            found[path] = block, tensors
    if not found:
        raise InheritanceError(f"blocks: expected a model with simplified blocks, got {type(model).__name__} without")
    try:
        warm.start(found, merge)
    except InputError as error:
        raise InheritanceError(f"blocks: {error}") from None
    for unit in units:
        if unit.simplified:
            unit.status = STARTED


def freeze(model: nn.Module, names: Iterable[str]) -> None:
    """Freeze modules and parameters by name, as `inherit` does: they get no gradient and stay in eval mode.

    Raises InheritanceError for a name that the model does not have, and then leaves the model unchanged.
    """
    found: list[nn.Module | nn.Parameter] = []
    for name in names:
        try:
            found.append(attrgetter(name)(model) if name else model)
        except AttributeError:
            raise InheritanceError(f"names: expected modules or parameters of the model, got {name!r}") from None
    for part in found:
        part.requires_grad_(False)
        for module in part.modules() if isinstance(part, nn.Module) else ():
            _hold_in_eval(module)


def freeze_norms(model: nn.Module) -> None:
    """Keep all batch norms in eval mode, so that their statistics do not change; weights and biases are trained."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            _hold_in_eval(module)


def is_frozen(module: nn.Module) -> bool:
    """Whether `freeze` froze all of a module: it has parameters, none gets a gradient, and it stays in eval mode."""
    parameters = list(module.parameters())
    held = all(getattr(vars(inner).get("train"), "func", None) is _eval_only for inner in module.modules())
    return held and bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def _hold_in_eval(module: nn.Module) -> None:
    # `train` is an attribute of the instance: a subclass would change type(module), and with a forward hook `training` would
    # be wrong until the module runs. The partial of a module-level function can be copied and pickled.
    module.train = partial(_eval_only, module)  # type: ignore[method-assign]
    module.eval()


def _eval_only(module: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(module, False)


def _units(model: nn.Module) -> Iterator[_Unit]:
    blocks = tuple(f"{path}." for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, SimplifiedBlock))
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        buffers = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        own = {prefix + n: t for n, t in {**module._parameters, **buffers}.items() if t is not None}
        simplified = prefix.startswith(blocks)
        rest = (t for child in module.children() for t in (*child.parameters(), *child.buffers()))
        if own and path and next(rest, None) is None:
            yield _Unit(path, own, True, simplified)
        else:
            yield from (_Unit(name, {name: tensor}, False, simplified) for name, tensor in own.items())


def _take(units: list[_Unit], state: dict[str, Tensor], label: str) -> None:
    """Sets `taken` and `status` of each unit that can take its tensors from `state` and has none from an earlier source."""
    free = [unit for unit in units if not unit.simplified]
    fitting = [unit for unit in free if unit.fits(state)]
    counted = sum(n in state for unit in fitting if not unit.always_trains for n in unit.tensors)
    wanted = sum(len(unit.tensors) for unit in free if not unit.always_trains)
    if counted < max(1, _ENOUGH * min(len(state), wanted)):
        raise InheritanceError(
            f"source: expected weights of this model's architecture, got {label}, of whose {len(state)} tensors {counted} fit"
            f"{_mismatches(units, state)}"
        )
    for unit in free:
        if unit.taken:
            continue
        if unit in fitting:
            unit.taken = {name: state[name] for name in unit.tensors if name in state}
            unit.status = TRAINS if unit.always_trains else INHERITED
        elif unit.differs(state):
            unit.status = DIFFERS


def _mismatches(units: list[_Unit], state: dict[str, Tensor]) -> str:
    ours = {name: tensor for unit in units for name, tensor in unit.tensors.items()}
    shapes = [n for n in state if n in ours and not _alike(ours[n], state[n])][:2]
    missing = [n for n in state if n not in ours][:2]
    reasons = [f"{n} is {list(state[n].shape)} in the source and {list(ours[n].shape)} in the model" for n in shapes]
    for name in missing:
        near = difflib.get_close_matches(name, ours, 1, 0.0)
        reasons.append(f"{name} is not in the model" + (f" (nearest: {near[0]})" if near else ""))
    return "".join(f"; {reason}" for reason in reasons)


def _drop_half_tied(units: list[_Unit]) -> None:
    """Inherit a tensor that several units own only if all of them inherit it with the same value."""
    owners: dict[int, list[tuple[_Unit, str]]] = defaultdict(list)
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


def _rows(units: list[_Unit]) -> Iterator[TableRow]:
    seen: set[int] = set()

    def split(path: str, inside: list[_Unit]) -> Iterator[TableRow]:
        statuses = {unit.status for unit in inside}
        if len(statuses) == 1:
            parameters = {id(t): t for unit in inside for t in unit.tensors.values() if isinstance(t, nn.Parameter)}
            yield TableRow(path, statuses.pop(), sum(t.numel() for key, t in parameters.items() if key not in seen))
            seen.update(parameters)
            return
        depth = path.count(".") + 1 if path else 0
        for name, children in groupby(inside, lambda unit: ".".join(unit.path.split(".")[: depth + 1])):
            yield from split(name, list(children))

    yield from split("", units)


def _matches(pattern: str, unit: _Unit) -> bool:
    paths = accumulate(unit.path.split("."), "{}.{}".format)
    return any(fnmatchcase(name, pattern) for name in (*paths, *unit.tensors))


def _alike(ours: Tensor, theirs: Tensor) -> bool:
    """Same shape and kind of number; checkpoints differ in whether a scalar is [] or [1]."""
    scalar = ours.numel() == theirs.numel() == 1 and max(ours.dim(), theirs.dim()) <= 1
    return (ours.shape == theirs.shape or scalar) and ours.is_floating_point() == theirs.is_floating_point()


def _state_of(source: Source, model: nn.Module) -> tuple[str, dict[str, Tensor]]:
    """Label of a source, and its tensors by their names in `model`."""
    prefixes: Mapping[str, str] | None = None  # of names in the source -> of names in the model; other names are ignored
    if isinstance(source, str) and source in plugins.entries("weights") and not Path(source).exists():
        prefixes = getattr(model, "origins", {}).get(source)
        if prefixes is None:
            known = ", ".join(getattr(model, "origins", {})) or "none by name"
            raise InheritanceError(f"source: expected weights that this model takes ({known}), got {source!r}")
        label, state = source, plugins.load("weights", source)()
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
    path = Path(source)
    name, slash, tag = str(source).removeprefix(TAG).partition("/")
    if not path.is_file() and slash and (str(source).startswith(TAG) or name in open_clip.list_models()):
        return _download(name, tag)
    if not path.is_file():
        raise FileNotFoundError(
            f"source: expected a file, open_clip's NAME/TAG or one of {', '.join(plugins.entries('weights'))}, got {path}"
            + where_to_get(path)
        )
    state = read_weights(path, InheritanceError, "source: expected weights, readable without running code")
    if not isinstance(state, Mapping):
        raise InheritanceError(f"source: expected a state dict in {path}, got {type(state).__name__}")
    return state


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
