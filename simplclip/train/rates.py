"""Learning rates by part: factors of optim.lr, by layer and by name.

A parameter has the factor d^n f. d is optim.layer_decay, n the number of layers of its tower after
its own; f is that of the last pattern of optim.lr_scale that matches one of its names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

import torch
from timm.models import group_parameters
from torch import Tensor, nn

from simplclip.models.inherit import freeze, largest_parts, matches
from simplclip.models.naming import SCALARS
from simplclip.train.config import Config, ConfigError

BLOCK = re.compile(r"(.*?\.\d+\.)\w+\.")  # a name that begins so is of a module in a list
HALF, MOST_NAMES = 3, 4  # of the log: the highest and the lowest rates, and names for each


def scales(model: Any, config: Config) -> dict[Tensor, float]:
    """Returns the factor of each parameter of `model`; raises ConfigError as `freeze_zeros`."""
    factors = dict.fromkeys(model.parameters(), 1.0)
    decay = config.optim.layer_decay
    if decay is not None:
        for key, tower in (("image", model.visual), ("text", getattr(model, "text", model))):
            layers = layers_of(tower)
            base = getattr(decay, key)
            last = max(layers.values())
            factors |= {weight: base ** (last - layer) for weight, layer in layers.items()}
    for weight, factor in _factors(model, config).items():
        factors[weight] *= factor
    return factors


def layers_of(tower: Any) -> dict[Tensor, int]:
    """Returns the layer of each parameter of a tower, from 0 at its input.

    They are timm's if the tower or its trunk has a group_matcher; what is around the trunk is in
    the last one. Else 0 has the embeddings and what comes before the blocks, then each block is a
    layer, and the last one has the rest. What blocks share is in the first one's layer.
    """
    trunk = getattr(tower, "trunk", tower)
    if hasattr(trunk, "group_matcher"):
        numbers = group_parameters(trunk, trunk.group_matcher(coarse=False), reverse=True)
        layers = dict.fromkeys(tower.parameters(), max(numbers.values()))
        return layers | {trunk.get_parameter(name): number for name, number in numbers.items()}
    # open_clip's CLIP is its own text tower
    weights = {n: w for n, w in tower.named_parameters() if not n.startswith(("visual.", *SCALARS))}
    blocks = list(dict.fromkeys(found[1] for found in map(BLOCK.match, weights) if found))
    layers, number, last = {}, 0, len(blocks) + 1
    for name, weight in weights.items():
        block = next((i for i, start in enumerate(blocks, 1) if name.startswith(start)), 0)
        number = block or (number and last)
        # a projection without a module is listed before the blocks, CLIP's embedding after them
        layers[weight] = number if "." in name else last
        if "emb" in name.partition(".")[0]:
            layers[weight] = 0
    return layers


def freeze_zeros(model: nn.Module, config: Config) -> list[str]:
    """Freezes, in place, what optim.lr_scale gives a factor of 0; returns its names, as `freeze`.

    Raises ConfigError for a pattern that matches nothing, one with another factor that matches
    frozen parameters alone, and factors after which no tower trains.
    """
    factors = _factors(model, config)
    zeros = {weight for weight, factor in factors.items() if factor == 0}
    names = largest_parts(model, zeros)
    freeze(model, names)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    if names and trained.issubset(SCALARS):
        got = config.optim.lr_scale
        raise ConfigError(f"optim.lr_scale: expected a tower that trains, got {got}")
    return names


def _factors(model: nn.Module, config: Config) -> dict[Tensor, float]:
    """Returns the factor of each parameter that a pattern matches; raises as `freeze_zeros`."""
    # a matrix that blocks share has several names
    weights = dict(model.named_parameters(remove_duplicate=False))
    factors: dict[Tensor, float] = {}
    for pattern, factor in config.optim.lr_scale.items():
        found = [weight for name, weight in weights.items() if matches(pattern, name)]
        if not found or (factor and not any(weight.requires_grad for weight in found)):
            near = get_close_matches(pattern, [*dict(model.named_modules()), *weights], 1)
            got = "frozen ones" if found else f"none; nearest: {', '.join(near) or 'none'}"
            raise ConfigError(
                "optim.lr_scale: expected patterns of parameters or modules that train, got "
                f"{pattern!r}, which matches {got}"
            )
        factors |= dict.fromkeys(found, factor)
    return factors


def describe(optimizer: torch.optim.Optimizer, model: nn.Module, config: Config) -> Iterator[str]:
    """Yields the log's lines about the optimizer: how many parameters train at which rate."""
    weights = dict[float, set[Tensor]]()
    for group in optimizer.param_groups:
        weights.setdefault(group.get("lr_scale", 1.0), set()).update(group["params"])
    factors = sorted(filter(weights.get, weights), reverse=True)
    yield f"optimizer  {config.optim.name}, learning rates: {len(factors)}"
    for factor in (*factors[:HALF], *factors[max(HALF, len(factors) - HALF) :]):
        count = sum(weight.numel() for weight in weights[factor])
        parts = [part or "the model" for part in largest_parts(model, weights[factor])]
        parts += [] if weights[factor] <= {*model.parameters()} else ["the loss"]
        if more := parts[MOST_NAMES:]:
            parts[MOST_NAMES:] = [f"{len(more)} more"]
        rate = f"{config.optim.lr * factor:.3g}"
        yield f"rate       {rate}: {count:,} parameters, {', '.join(parts)}"
