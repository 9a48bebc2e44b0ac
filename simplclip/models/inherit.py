"""Weights from other models: `inherit` copies and freezes modules that a student shares with a teacher or pretrained model,
`load_weights` copies all tensors that fit and freezes nothing.

    model = simplclip.models.create("siclip2-s0")
    print(simplclip.inherit(model, "MobileCLIP2-S0/dfndr2b"))

`freeze` only freezes, e.g. the names in `Inheritance.names` after loading a checkpoint. No
tensor in a frozen prefix of a tower requires a gradient, so autograd keeps none of its activations. Source: WIKD of arXiv
2411.14789.

Copied weights compute the same as in the source, except for RMSNorm's eps in blocks of He & Hofmann: see nn.SimplifiedBlock.
"""

import difflib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from itertools import accumulate
from operator import attrgetter
from typing import Any

from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from simplclip.common.errors import InputError
from simplclip.models import init_blocks
from simplclip.models.weight_table import InheritanceError, Status, Unit, Units, WeightTable, alike
from simplclip.models.weights import Source, state_of
from simplclip.nn import SimplifiedBlock

__all__ = ["Inheritance", "InheritanceError", "freeze", "freeze_norms", "inherit", "is_frozen", "load_weights"]


class Inheritance(WeightTable):
    """The result of `inherit`: a table of the model, and the sources of the weights."""

    title = "inherited from"

    @property
    def names(self) -> list[str]:
        """Names of the frozen modules and parameters, as `freeze` takes them."""
        return [row.module for row in self.rows if row.status == Status.INHERITED]


def inherit(
    model: nn.Module,
    source: Source | Sequence[Source],
    *,
    train: str | Sequence[str] = (),
    blocks: str | None = None,
) -> Inheritance:
    """Copies every unchanged module of ``source`` into ``model``, in place, and freezes it there.

    A module is unchanged if the source has the same tensors under the same names in the same shapes. Modules in a
    `SimplifiedBlock` are copied from a simplified block alone, since equal names may have another meaning (FastViT's
    ``norm`` is a batch norm); they are not frozen, and neither are ``logit_scale`` and ``logit_bias``. Frozen modules get no
    gradient and stay in eval mode even after ``model.train()``, so that norm statistics do not change. deepcopy and pickle
    keep this, while a state dict has only weights (see `freeze`).

    Args:
        model: the student.
        source: a module; a state dict; a file of torch.save (a state dict, bare or under "state_dict" or "model", read
            with weights_only) or of safetensors; the folder of a run or of an export; ``NAME/TAG`` or
            ``open_clip:NAME/TAG`` for weights that open_clip downloads; or a name in `packaged.SOURCES`, e.g.
            efficientnet-lite0, if ``model.origins`` has it. If several sources fit a module, the first one is used.
        train: patterns (fnmatch, ``*`` matches dots too) of modules or tensors that are copied but not frozen. A pattern
            that matches a module applies to everything in it; one that matches a tensor applies to its whole module.
        blocks: None, or how simplified blocks start from the source's blocks in their places, see `init_blocks.convert`. A
            matrix that blocks share becomes the "average" of their folded matrices, or the matrix of the "first" block.
            These blocks train. The first source with a block in a place is used. Blocks that were copied stay as they are.

    Returns:
        A table of module, status and parameters, with the names of the frozen modules and parameters.

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
    units = Units.of(model)
    labels, states = list[str](), list[dict[str, Tensor]]()
    for each in sources:
        label, state = state_of(each, model)
        labels.append(label)
        states.append(state)
        units.take(state, label)
    units.drop_half_tied()
    for unit in units:
        if unit.taken:
            unit.status = Status.TRAINS if unit.block or unit.always_trains else Status.INHERITED
    for pattern in patterns:
        matching = [unit for unit in units if _matches(pattern, unit)]
        if not matching:
            near = difflib.get_close_matches(pattern, [unit.path for unit in units], 1, 0.3)
            raise InheritanceError(f"train: expected a pattern that matches a module, got {pattern!r}; nearest: {near}")
        for unit in matching:
            unit.status = Status.TRAINS if unit.taken else unit.status
    if blocks is not None:
        _start_blocks(model, units, states, ", ".join(labels), blocks)
    units.copy_taken()
    result = Inheritance(units.rows(), tuple(labels))
    freeze(model, result.names)
    return result


def _start_blocks(model: nn.Module, units: Units, states: list[dict[str, Tensor]], label: str, merge: str) -> None:
    """Starts the simplified blocks that were not copied: each from the first source with a block in its place."""
    simplified = {path: m for path, m in model.named_modules() if isinstance(m, SimplifiedBlock)}
    if not simplified:
        raise InheritanceError(f"blocks: expected a model with simplified blocks, got {type(model).__name__} without")
    new = {unit.block for unit in units if not unit.taken}
    starts: dict[str, tuple[SimplifiedBlock, dict[str, Tensor]]] = {}
    for path in (path for path in simplified if path in new):
        blocks = ({n.removeprefix(f"{path}."): state[n] for n in state if n.startswith(f"{path}.")} for state in states)
        tensors = next((tensors for tensors in blocks if init_blocks.is_block(tensors)), None)
        if tensors is None:
            raise InheritanceError(f"blocks: expected a source with a block {path}, got {label} without")
        starts[path] = simplified[path], tensors
    try:
        init_blocks.start(starts, merge)
    except InputError as error:
        raise InheritanceError(f"blocks: {error}") from None
    for unit in units:
        if unit.block in starts:
            unit.status, unit.taken = Status.STARTED, {}


def load_weights(model: nn.Module, source: Source) -> WeightTable:
    """Copies into ``model``, in place, every tensor of ``source`` whose name and shape the model has. Nothing is frozen.

    Positional embeddings of another image size or context length are interpolated: over the grid of the image (bicubic, its
    prefix tokens kept) or along the text (linear), as open_clip does. Tensors in a `SimplifiedBlock` are taken from a
    simplified block alone, since equal names may have another meaning. A tensor that modules of the model share is taken if
    the source has one value for it.

    Returns a table of what was loaded, resized, new, and of another shape. model: any model of this library or of open_clip.
    source: as for `inherit`, whose errors are raised; then the model is unchanged.
    """
    label, state = state_of(source, model)
    units = Units.of(model).split()
    targets = {name: target for unit in units for name, target in unit.tensors.items() if name in state}
    values = {name: _resized(model, name, target, state[name]) for name, target in targets.items()}
    resized = {name: value for name, value in values.items() if value is not None}
    units.take({**state, **resized}, label)
    units.drop_half_tied()
    for unit in units:
        if unit.taken:
            unit.status = Status.RESIZED if unit.path in resized else Status.LOADED
    units.copy_taken()
    return WeightTable(units.rows(), (label,))


def _resized(model: nn.Module, name: str, target: Tensor, value: Tensor) -> Tensor | None:
    """Resizes a positional embedding [..., tokens, C] to the shape of `target`; returns None for other tensors."""
    positions = name.rpartition(".")[2] in ("positional_embedding", "pos_embed", "pos_embedding") and not alike(target, value)
    if not positions or target.shape[:-2] != value.shape[:-2] or target.shape[-1] != value.shape[-1]:
        return None
    old, tokens = value.reshape(1, -1, value.shape[-1]).float(), target.numel() // target.shape[-1]
    if not name.startswith("visual."):
        new = nn.functional.interpolate(old.mT, size=tokens, mode="linear").mT
        return new.reshape(target.shape).to(value.dtype)
    visual: Any = model.visual
    grid = visual.grid_size if hasattr(visual, "grid_size") else visual.trunk.patch_embed.grid_size
    prefix = tokens - math.prod(grid)
    side = math.isqrt(max(0, old.shape[1] - prefix))
    if prefix < 0 or side * side != old.shape[1] - prefix or not side:
        return None
    new = resample_abs_pos_embed(old, list(grid), [side, side], num_prefix_tokens=prefix)
    return new.reshape(target.shape).to(value.dtype)


def freeze(model: nn.Module, names: Iterable[str]) -> None:
    """Freezes modules and parameters by name, as `inherit` does: they get no gradient and stay in eval mode.

    Raises InheritanceError for a name that the model does not have, and then leaves the model unchanged.
    """
    parts: list[nn.Module | nn.Parameter] = []
    for name in names:
        try:
            parts.append(attrgetter(name)(model) if name else model)
        except AttributeError:
            raise InheritanceError(f"names: expected modules or parameters of the model, got {name!r}") from None
    for part in parts:
        part.requires_grad_(False)
        for module in part.modules() if isinstance(part, nn.Module) else ():
            _hold_in_eval(module)


def freeze_norms(model: nn.Module) -> None:
    """Keeps all batch norms in eval mode, so that their statistics do not change; weights and biases are trained."""
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


def _matches(pattern: str, unit: Unit) -> bool:
    paths = accumulate(unit.path.split("."), "{}.{}".format)
    return any(fnmatchcase(name, pattern) for name in (*paths, *unit.tensors))
