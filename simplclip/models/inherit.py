"""Weights from other models: `inherit` copies and freezes unchanged modules, `freeze` freezes.

    model = simplclip.models.create("open_clip:ViT-B-32", simplify_options={})
    print(simplclip.inherit(model, "ViT-B-32/openai"))

Autograd keeps no activations of a frozen prefix of a tower: arXiv 2411.14789.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from itertools import accumulate, groupby
from typing import Any, Literal

import torch
from open_clip.model import resize_pos_embed, resize_text_pos_embed
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from simplclip.common.errors import InputError
from simplclip.models import init_blocks
from simplclip.models.naming import SCALARS
from simplclip.models.weights import CheckpointError, parse_source, renamed
from simplclip.nn import SimplifiedBlock
from simplclip.ops import checks

Weights = str | os.PathLike[str] | nn.Module | Mapping[str, Any]
# the source has another architecture if a smaller share of its (or the model's) tensors fit
_ENOUGH = 0.1
# tensors that say nothing of it: positions may be interpolated
_ANYWHERE = (*SCALARS, "positional_embedding", "pos_embed")
# copied from the source and frozen; copied, and trains; not of the source
Status = Literal["inherited", "trains", "new"]


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
        return [name for name, (status, _) in self.rows.items() if status == "inherited"]

    def status(self, tensor: str) -> Status:
        """Returns the status of a tensor of the model's state dict, by its name."""
        paths = ("", *accumulate(tensor.split("."), "{}.{}".format))
        return next(self.rows[path][0] for path in paths if path in self.rows)

    def __str__(self) -> str:
        """Returns the table as text: a line for each row, totals by status, the sources above."""
        totals = Counter[Status]()
        for status, count in self.rows.values():
            totals[status] += count
        rows = [(*row, name or "(all)") for name, row in self.rows.items()]
        rows += [(*total, "total") for total in totals.items()]
        table = [f"{status:<9}  {count:>12,}  {name}" for status, count, name in rows]
        sources = ", ".join(self.sources)
        return "\n".join([f"weights from {sources}", "weights      parameters  module", *table])


def inherit(
    model: nn.Module,
    source: Weights | Sequence[Weights],
    *,
    train: str | Sequence[str] = (),
    blocks: str | None = None,
) -> WeightTable:
    """Copies every unchanged module of ``source`` into ``model``, in place, and freezes it there.

    A module is unchanged if the source has the same tensors under the same names in the same
    shapes. Positional embeddings of another image size or context length are interpolated, as
    open_clip does: over the grid of the image (bicubic, its prefix tokens kept) or along the text
    (linear). Modules in a `SimplifiedBlock` are only copied from a simplified block, since equal
    names may have another meaning (FastViT's ``norm`` is a batch norm). These two are not frozen,
    and neither are ``logit_scale`` and ``logit_bias``. What is frozen stays so in copies and
    pickles, while a state dict has only weights (see `freeze`).

    Args:
        source: a module, a state dict, or what names weights, see `simplclip.models.weights`. If
            several sources fit a module, the first one is used.
        train: patterns (fnmatch, ``*`` matches dots too) of modules or tensors that are copied but
            not frozen. A pattern that matches a module applies to everything in it; one that
            matches a tensor applies to its whole module. With "*" nothing is frozen.
        blocks: None, or how simplified blocks that were not copied start from the source's blocks
            in their places, see `init_blocks`: a matrix that blocks share becomes the "average" of
            their matrices, or that of the "first" block. These blocks train.

    Raises, and leaves the model unchanged:
        CheckpointError: the source has another architecture or cannot be read as weights.
        InputError: no source is given; a pattern matches nothing; or, with ``blocks``, the source
            has no block in the place of a simplified block, or one of another kind or shape.
        FileNotFoundError: there is no such file.
    """
    checks.check_instance("model", model, nn.Module, "an nn.Module")
    sources = [source] if isinstance(source, str | os.PathLike | nn.Module | Mapping) else source
    expected = "a module, a state dict, a path or name, or a list of them"
    checks.check_instance("source", sources, Sequence, expected)
    if not sources:
        raise InputError("source: expected at least one, got an empty list")
    expected = "a pattern, or a sequence of patterns"
    patterns = [train] if isinstance(train, str) else checks.sequence("train", train, expected)
    units = units_of(model)
    trained = trained_units(units, patterns)
    labels, states = list[str](), list[dict[str, Tensor]]()
    for each in sources:
        if isinstance(each, nn.Module | Mapping):
            label, given = type(each).__name__, renamed(each, model)
        else:
            parsed = parse_source(each)
            label, given = parsed.label, renamed(parsed.load(), model)
        state = _resized(given, model)
        labels.append(label)
        states.append(state)
        for unit in _fitting(units, state, label):
            if unit.status == "new":
                unit.values = {name: state[name] for name in unit.tensors if name in state}
                resized = any(value is not given[name] for name, value in unit.values.items())
                trains = resized or unit.block or unit.path.endswith(SCALARS) or unit in trained
                unit.status = "trains" if trains else "inherited"
    if blocks is not None:
        _start_blocks(model, units, states, blocks)
    with torch.no_grad():
        for unit in units:
            for name, value in unit.values.items():
                unit.tensors[name].copy_(value)
    table = WeightTable(dict(_rows("", units, set())), labels)
    freeze(model, table.names)
    return table


@dataclass(eq=False)
class Unit:
    """Tensors of a model, by name, that are taken together or not at all, and what they take.

    path: of a module whose submodules have no tensors, or of a single tensor. block: the path of
    the simplified block that contains the unit, or "".
    """

    path: str
    tensors: dict[str, Tensor]
    block: str
    status: Status = "new"
    values: dict[str, Tensor] = field(default_factory=dict)


def units_of(model: nn.Module) -> list[Unit]:
    """Returns the units of a model, in the order of its state dict."""
    tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
    modules = model.named_modules(remove_duplicate=False)
    blocks = [path for path, module in modules if isinstance(module, SimplifiedBlock)]
    units = []
    for path, group in groupby(tensors, lambda name: name.rpartition(".")[0]):
        names = list(group)
        whole = path and len(model.get_submodule(path).state_dict()) == len(names)
        parts = {path: names} if whole else {n: [n] for n in names}
        block = next((block for block in blocks if names[0].startswith(f"{block}.")), "")
        units += [Unit(part, {n: tensors[n] for n in own}, block) for part, own in parts.items()]
    return units


def trained_units(units: Iterable[Unit], patterns: Iterable[str]) -> list[Unit]:
    """Returns the units that `inherit`'s patterns match; InputError if one matches none."""
    trained = list[Unit]()
    for pattern in patterns:
        found = [unit for unit in units if matches(pattern, unit.path, unit.tensors)]
        if not found:
            raise InputError(f"train: expected a pattern that matches a module, got {pattern!r}")
        trained += found
    return trained


def _resized(given: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Returns a source's tensors with positional embeddings in the model's size, if possible."""
    state = dict(given)
    for resize in (resize_pos_embed, resize_text_pos_embed, _resize_timm):
        # other towers, another width, an embedding that is not of a square
        with contextlib.suppress(ArithmeticError, AssertionError, AttributeError, RuntimeError):
            resize(state, model)
    return state


def _resize_timm(state: dict[str, Tensor], model: Any) -> None:
    """Does for a trunk of timm, in place, what open_clip's functions do for its own towers."""
    name, trunk = "visual.trunk.pos_embed", model.visual.trunk
    grid = list(trunk.patch_embed.grid_size)
    if name in state:
        prefix = trunk.pos_embed.shape[1] - math.prod(grid)
        state[name] = resample_abs_pos_embed(state[name], grid, num_prefix_tokens=prefix)


def _fitting(units: Sequence[Unit], state: Mapping[str, Tensor], label: str) -> list[Unit]:
    """Returns the units of which a source has the tensors in the same shapes, and no others.

    Raises CheckpointError if they are too few for a model of the same architecture.
    """
    by_path = defaultdict[str, dict[str, Sequence[int]]](dict)
    for name, tensor in state.items():
        by_path[name][name] = by_path[name.rpartition(".")[0]][name] = tensor.shape
    fitting = []
    for unit in units:
        found = by_path[unit.path]
        # old batch norms lack num_batches_tracked
        needed = [n for n in unit.tensors if n in found or not n.endswith("num_batches_tracked")]
        # names in a simplified block mean the same in another one only
        same_kind = not unit.block or f"{unit.block}.qk.weight" in state
        if found and same_kind and found == {n: unit.tensors[n].shape for n in needed}:
            fitting.append(unit)
    counted = [unit for unit in fitting if not unit.path.endswith(_ANYWHERE)]
    fit = sum(len(unit.tensors) for unit in counted)
    outside = sum(len(unit.tensors) for unit in units if not unit.block)
    if fit < max(1, _ENOUGH * min(len(state), outside)):
        raise CheckpointError(
            f"source: expected weights of this model's architecture, got {label}, of whose "
            f"{len(state)} tensors {fit} fit"
        )
    return fitting


def _start_blocks(
    model: nn.Module, units: Sequence[Unit], states: Sequence[Mapping[str, Tensor]], merge: str
) -> None:
    """Starts the simplified blocks that are new, in place, each from the first source's block."""
    simplified = {unit.block for unit in units if unit.block}
    if not simplified or merge not in init_blocks.MERGES:
        expected = f"one of {init_blocks.MERGES}, for a model with simplified blocks"
        raise InputError(f"blocks: expected {expected}, got {merge!r} for {len(simplified)} blocks")
    starts: dict[str, Any] = {}
    for path in dict.fromkeys(unit.block for unit in units if unit.block and unit.status == "new"):
        start = f"{path}."
        for state in states:
            tensors = {n.removeprefix(start): t for n, t in state.items() if n.startswith(start)}
            if tensors and path not in starts:
                starts[path] = model.get_submodule(path), tensors
        if path not in starts:
            raise InputError(f"blocks: expected a source with a block {path}, got none")
    init_blocks.start(starts, merge)
    for unit in units:
        if unit.block in starts:
            unit.status, unit.values = "trains", {}


def _rows(
    path: str, units: Sequence[Unit], counted: set[Tensor]
) -> Iterator[tuple[str, tuple[Status, int]]]:
    """Yields rows of the table for the units inside `path`; their tensors become `counted`."""
    if len({unit.status for unit in units}) == 1:
        own = {tensor for unit in units for tensor in unit.tensors.values()} - counted
        counted |= own
        size = sum(tensor.numel() for tensor in own if isinstance(tensor, nn.Parameter))
        yield path, (units[0].status, size)
        return
    depth = path.count(".") + 2 if path else 1
    for child, parts in groupby(units, lambda unit: ".".join(unit.path.split(".")[:depth])):
        yield from _rows(child, list(parts), counted)


def matches(pattern: str, part: str, names: Iterable[str] = ()) -> bool:
    """Whether a pattern (fnmatch) matches a part, a module that contains it, or one of `names`."""
    paths = accumulate(part.split("."), "{}.{}".format)
    return any(fnmatchcase(name, pattern) for name in (*paths, *names))


def freeze(model: nn.Module, names: Iterable[str]) -> None:
    """Freezes modules and parameters by name, in place, as `inherit` does.

    names: as of get_submodule or named_parameters; "" is the whole model. Parameters get no
    gradient, and modules stay in eval mode even after `train()`. Raises InputError for a name that
    the model does not have, and then leaves the model unchanged.
    """
    names = checks.sequence("names", names, "names of modules or parameters")
    known: dict[Any, Any] = dict(model.named_modules(remove_duplicate=False))
    known |= model.named_parameters(remove_duplicate=False)
    for name in names:
        if not isinstance(name, str) or name not in known:
            raise InputError(f"names: expected modules or parameters of the model, got {name!r}")
    for part in [known[name] for name in names]:
        part.requires_grad_(False)
        for module in part.modules() if isinstance(part, nn.Module) else ():
            _hold_in_eval(module)


def freeze_norms(model: nn.Module) -> None:
    """Keeps all batch norms in eval mode, also after model.train(): their statistics stay.

    Whether their weights and biases are trained does not change.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            _hold_in_eval(module)


def is_frozen(module: nn.Module) -> bool:
    """Whether a module has parameters, and `freeze` froze all of it."""
    parameters = list(module.parameters())
    if not parameters or any(parameter.requires_grad for parameter in parameters):
        return False
    held = [getattr(vars(part).get("train"), "func", None) for part in module.modules()]
    return all(function is _set_eval for function in held)


def largest_modules(
    model: nn.Module, accepts: Callable[[nn.Module], bool] = is_frozen
) -> dict[str, nn.Module]:
    """Returns, by name, the modules that are accepted, the largest that are so as one.

    accepts: by default whether a module is frozen.
    """
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()  # beginnings of the names within those
    for name, module in model.named_modules():
        if not name.startswith(inside) and accepts(module):
            inside += (f"{name}." if name else "",)
            found[name] = module
    return found


def largest_parts(model: nn.Module, weights: Set[Tensor]) -> list[str]:
    """Returns the names of the largest modules, and of other parameters, with `weights` alone.

    A module may also have parameters that do not train.
    """
    others = {w for w in model.parameters() if w.requires_grad} - weights

    def has_these_alone(module: nn.Module) -> bool:
        """Whether a module has some of the weights, and no others that train."""
        own = {*module.parameters()}
        return bool(own & weights) and not own & others

    modules = largest_modules(model, has_these_alone)
    rest = weights - {w for module in modules.values() for w in module.parameters()}
    return [*modules, *(name for name, w in model.named_parameters() if w in rest)]


def _hold_in_eval(module: nn.Module) -> None:
    """Puts a module into eval mode and replaces its `train`, so that it stays there."""
    # `train` is an attribute of the instance: a subclass would change type(module), and with a
    # forward hook `training` would be wrong until the module runs. The partial of a module-level
    # function can be copied and pickled.
    module.train = partial(_set_eval, module)  # type: ignore[method-assign]
    module.eval()


def _set_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    """Puts a module into eval mode whatever `mode` is, and returns it."""
    return nn.Module.train(module, False)
