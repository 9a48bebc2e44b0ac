"""The optimizer of a run, the learning rate of each step and part, and averages of the weights.

A parameter has the rate optim.lr d^n f. d is optim.layer_decay, n the number of layers of its tower
after its own; f is that of the last pattern of optim.lr_scale that matches one of its names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from inspect import signature
from typing import Any

import timm.optim
import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from simplclip.common.errors import first_line
from simplclip.models.inherit import freeze, largest_parts, matches
from simplclip.models.naming import SCALARS
from simplclip.ops.modes import has_values
from simplclip.train.config import Config, ConfigError

BLOCK = re.compile(r"(.*?\.\d+\.)\w+\.")  # a name that begins so is of a module in a list
HALF, MOST_NAMES = 3, 4  # of the log: the highest and the lowest rates, and names for each


class Average:
    """The moving average of a run's weights: v = decay v + (1 - decay) w after each step.

    It copies each parameter that trains, but no buffers: with the averages a model has those of the
    last step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Copies the weights of `model` that train, at which the averages start."""
        self.averages = {
            weight: weight.detach().clone() for weight in model.parameters() if weight.requires_grad
        }
        # a weight that blocks share has several
        names = model.state_dict(keep_vars=True).items()
        self.names = {name: weight for name, weight in names if weight.requires_grad}
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """Moves the averages towards the present weights; to be called after each step."""
        self._average(list(self.averages.values()), list(self.averages), 0)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Context in which the model has the averages as its parameters; nothing is copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        """Exchanges the weights of the model and the averages, without copying them."""
        for weight, average in self.averages.items():
            weight.data, self.averages[weight] = average, weight.data

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the averages by the names of the model's state dict."""
        return {name: self.averages[weight] for name, weight in self.names.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Overwrites the averages by those of a state dict; KeyError if one is missing."""
        for name, weight in self.names.items():
            self.averages[weight].copy_(state[name])


def make_optimizer(model: nn.Module, loss: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Returns the optimizer of the parameters of `model` and `loss` that train; matrices decay.

    It is torch's fused AdamW, or made by timm's create_optimizer_v2. Raises ConfigError for a name
    that timm does not have or that cannot train here, for options that the optimizer does not take
    or that its first step refuses, and as `scales`.
    """
    name = config.optim.name
    options: dict[str, Any] = config.optim.options
    cls: Any = torch.optim.AdamW if name == "adamw" else _class_of(name)
    make = partial(cls, fused=True) if name == "adamw" else partial(create_optimizer_v2, opt=name)
    groups = _groups(model, loss, config)
    try:
        # create_optimizer_v2 takes no notice of some that the class does not have
        known = signature(cls).parameters.keys() - {"params", "lr", "weight_decay"}
        if unknown := options.keys() - known:
            raise TypeError(f"unexpected {', '.join(sorted(unknown))}")
        _try(make, groups, lr=config.optim.lr, weight_decay=0.0, **options)
        return make(groups, lr=config.optim.lr, weight_decay=0.0, **options)
    except (TypeError, ValueError, IndexError, RuntimeError, AssertionError) as error:
        package = cls.__module__.rpartition(".")[0]
        raise ConfigError(
            f"optim.options: expected arguments of {package}.{cls.__name__}, got {options}: "
            f"{first_line(error)}"
        ) from None


def _try(make: Callable, groups: list[dict[str, Any]], **options: Any) -> None:
    """Updates a small vector, matrix and convolution, on the groups' device, and raises what that
    raises: many classes read some of their options only then.
    """
    like = next(weight for group in groups for weight in group["params"]).detach()
    if not has_values(like):  # in a plan an update cannot read them
        return
    shapes = ((8,), (8, 8), (8, 8, 2, 2))
    weights = [nn.Parameter(like.new_zeros(shape)) for shape in shapes]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    make([{"params": weights}], **options).step()


def _class_of(name: str) -> Any:
    """Returns the class of one of timm's optimizers; ConfigError if it cannot train here."""
    names = [str(known) for known in timm.optim.list_optimizers()]
    try:
        if name not in names:
            raise ImportError(f"nearest: {', '.join(get_close_matches(name, names)) or 'none'}")
        if timm.optim.get_optimizer_info(name).second_order:
            raise ImportError("it needs second derivatives")
        if "kron" in name and not torch.backends.opt_einsum.is_available():
            raise ImportError("it needs the package opt_einsum, or else too much memory")
        return timm.optim.get_optimizer_class(name, bind_defaults=False)
    except (AssertionError, ImportError) as error:
        expected = "an optimizer of timm that runs here"
        raise ConfigError(f"optim.name: expected {expected}, got {name!r}; {error}") from None


def _groups(model: nn.Module, loss: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Returns what trains, by the factor of its rate and by whether it decays, as timm groups it.

    Without other factors than 1 the two groups have no "lr_scale".
    """
    factors = scales(model, config)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    for parameter in (*model.parameters(), *loss.parameters()):
        if parameter.requires_grad:
            # A matrix has two dimensions above 1; a layer scale [C, 1, 1] is a gain.
            decays = parameter in factors and sum(size > 1 for size in parameter.shape) >= 2
            groups.setdefault((factors.get(parameter, 1.0), decays), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": config.optim.weight_decay if decays else 0.0}
        | ({"lr_scale": factor} if len(groups) > 2 else {})
        for (factor, decays), parameters in sorted(groups.items(), reverse=True)
    ]


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Loads a state dict; decay and factors of rates stay those of the optimizer.

    ValueError for moments of another shape, beyond which fused updates would read.
    """
    kept = ("lr_scale", "weight_decay")
    settings = [
        {name: group[name] for name in kept if name in group} for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(saved)
    for group, own in zip(optimizer.param_groups, settings):
        group |= own
    if not optimizer.defaults.get("fused"):
        return  # moments may have other shapes, which the update checks itself
    for weight, moments in optimizer.state.items():
        for name, moment in moments.items():
            shape = list(moment.shape)
            if shape != ([] if name == "step" else list(weight.shape)):
                raise ValueError(f"{name} of shape {shape} for {list(weight.shape)}")


def learning_rate(config: Config, step: int) -> float:
    """Returns the learning rate of `step` (from 0): linear warm-up, then a cosine down to 0."""
    lr, warmup, steps = config.optim.lr, config.optim.warmup, config.run.steps
    assert steps is not None
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / (steps - warmup)
    return lr * 0.5 * (1 + math.cos(math.pi * done))


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
