"""Weights from other models: `inherit` copies and freezes unchanged modules, `freeze` freezes.

    model = simplclip.models.create("open_clip:ViT-B-32", simplify_options={})
    print(simplclip.inherit(model, "ViT-B-32/openai"))

No tensor in a frozen prefix of a tower requires a gradient, so autograd keeps none of its
activations: arXiv 2411.14789.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from fnmatch import fnmatchcase
from functools import partial
from itertools import accumulate
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from simplclip.common.errors import InputError
from simplclip.models import init_blocks
from simplclip.models.source import parse_weights
from simplclip.models.transfer import Status, Transfer, WeightTable
from simplclip.models.weights import renamed
from simplclip.ops import checks

Weights = str | os.PathLike[str] | nn.Module | Mapping[str, Any]


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
    and neither are ``logit_scale`` and ``logit_bias``. Frozen modules get no gradient and stay in
    eval mode even after ``model.train()``, so that norm statistics do not change. deepcopy and
    pickle keep this, while a state dict has only weights (see `freeze`).

    Args:
        source: a module; a state dict; a file of torch.save (a state dict, bare or under
            "state_dict" or "model", read with weights_only) or of safetensors; the folder of a run
            or of an export; ``NAME/TAG`` or ``open_clip:NAME/TAG`` for weights that open_clip
            downloads; or, for a model with the nets of those packages, a name in
            `packaged.STATES`. If several sources fit a module, the first one is used.
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
    checks.check_instance("model", model, nn.Module, "an nn.Module")
    sources = [source] if isinstance(source, str | os.PathLike | nn.Module | Mapping) else source
    checks.check_instance(
        "source", sources, Sequence, "a module, a state dict, a path or name, or a list of them"
    )
    if not sources:
        raise InputError("source: expected at least one, got an empty list")
    expected = "a pattern, or a sequence of patterns"
    patterns = [train] if isinstance(train, str) else checks.sequence("train", train, expected)
    for pattern in patterns:
        checks.check_instance("train", pattern, str, expected)
    transfer = Transfer(model)
    loaded = [_labelled(each, model) for each in sources]
    for label, state in loaded:
        transfer.take(state, label)
    transfer.drop_half_tied()
    for pattern in patterns:
        matching = [unit for unit, names in transfer.units.items() if matches(pattern, unit, names)]
        if not matching:
            near = difflib.get_close_matches(pattern, transfer.units, 1, 0.3)
            raise InputError(
                f"train: expected a pattern that matches a module, got {pattern!r}; nearest: {near}"
            )
        for unit in matching:
            if transfer.status[unit] == Status.INHERITED:
                transfer.status[unit] = Status.TRAINS
    labels = [label for label, _ in loaded]
    if blocks is not None:
        _start_blocks(model, transfer, [state for _, state in loaded], ", ".join(labels), blocks)
    table = transfer.copy(labels)
    freeze(model, table.names)
    return table


def _labelled(source: Weights, model: nn.Module) -> tuple[str, dict[str, Tensor]]:
    """Returns the label of a source for messages, and its tensors by their names in `model`."""
    if isinstance(source, nn.Module):
        return type(source).__name__, renamed(source, model)
    if isinstance(source, Mapping):
        return "the state dict", renamed(source, model)
    parsed = parse_weights(source)
    return str(parsed), renamed(parsed.load(), model)


def _start_blocks(
    model: nn.Module, transfer: Transfer, states: list[dict[str, Tensor]], label: str, merge: str
) -> None:
    """Starts the simplified blocks that were not copied, in place, from the first that fit."""
    simplified = {block for block in transfer.blocks.values() if block}
    if not simplified or merge not in init_blocks.MERGES:
        expected = f"one of {init_blocks.MERGES}, for a model with simplified blocks"
        raise InputError(f"blocks: expected {expected}, got {merge!r} for {len(simplified)} blocks")
    starts: dict[str, Any] = {}
    for unit, path in transfer.blocks.items():
        if not path or path in starts or transfer.is_taken(unit):
            continue
        candidates = (_inside(path, state) for state in states)
        tensors = next(filter(init_blocks.is_block, candidates), None)
        if tensors is None:
            raise InputError(f"blocks: expected a source with a block {path}, got {label} without")
        starts[path] = model.get_submodule(path), tensors
    init_blocks.start(starts, merge)
    for unit, block in transfer.blocks.items():
        if block in starts:
            transfer.reset(unit, Status.STARTED)


def _inside(path: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of the module at `path`, by their names in it; without any, {}."""
    inside = [name for name in state if name.startswith(f"{path}.")]
    return {name.removeprefix(f"{path}."): state[name] for name in inside}


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
    try:
        parts: list[Any] = [attrgetter(name)(model) if name else model for name in names]
    except (AttributeError, TypeError) as error:
        raise InputError(
            f"names: expected modules or parameters of the model, got others: {error}"
        ) from None
    for name, part in zip(names, parts):
        if not isinstance(part, nn.Module | Tensor):
            kind = type(part).__name__
            raise InputError(
                f"names: expected modules or parameters of the model, got {name!r}, a {kind}"
            )
    for part in parts:
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
    return all(map(_stays_in_eval, module.modules()))


def frozen_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields (name, module) of the modules that are frozen, the largest that are frozen as one."""
    inside: tuple[str, ...] = ()  # beginnings of the names within those
    for name, module in model.named_modules():
        if not name.startswith(inside) and is_frozen(module):
            prefix = f"{name}." if name else ""
            inside += (prefix,)
            yield name, module


def largest_parts(model: nn.Module, weights: Set[Tensor]) -> list[str]:
    """Returns the names of the largest modules, and of other parameters, with `weights` alone.

    A module may also have parameters that do not train.
    """
    frozen = {weight for weight in model.parameters() if not weight.requires_grad}
    names, inside = list[str](), tuple[str, ...]()  # inside: beginnings of the names in a module
    for name, module in model.named_modules():
        found = set(module.parameters())
        if found & weights and found <= weights | frozen and not name.startswith(inside):
            names.append(name)
            inside += (f"{name}." if name else "",)
    singles = (name for name, weight in model.named_parameters() if weight in weights)
    return names + [name for name in singles if not name.startswith(inside)]


def _stays_in_eval(module: nn.Module) -> bool:
    """Whether `_hold_in_eval` was called on a module itself; its children are not looked at."""
    return getattr(vars(module).get("train"), "func", None) is _set_eval


def release(module: nn.Module) -> None:
    """Undoes what `freeze` and `freeze_norms` did to a module's mode; its children's stay."""
    vars(module).pop("train", None)


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
