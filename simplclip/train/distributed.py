"""Training of one model by several ranks, which average gradients and share statistics of norms.

Each tower has a wrapper of its own, since `gradient_cache.backward` exchanges a tower's gradients
in its last backward pass. Losses average the gradients of their own parameters; `average_gradient`
does it for logit scale and bias, which a step may not use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from simplclip.common import ranks
from simplclip.models.naming import SCALARS, tower_of
from simplclip.ops import distributed
from simplclip.train.config import ConfigError

Scale = TypeVar("Scale", Tensor, Tensor | None)


def share_norms(model: nn.Module, device: torch.device) -> None:
    """Makes batch norms in training mode use the statistics of all ranks, in place.

    Raises ConfigError on a CPU, where torch cannot do that.
    """
    if ranks.count() == 1:
        return
    # unlike torch's own, it keeps timm's activations
    from timm.layers import convert_sync_batchnorm

    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        if not isinstance(module, _BatchNorm) or not module.training:
            continue
        if device.type != "cuda":
            raise ConfigError(
                f"model.freeze_norms: expected true for several ranks on a {device.type}, where "
                f"their batch norms would drift; got false and {type(module).__name__} '{name}' in "
                "training mode"
            )
        model.set_submodule(name, convert_sync_batchnorm(module))


class _Weights(nn.Module):
    """A tower's parameters as one module; its forward calls the function that it is given."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(parameters)

    def forward(self, encode: Callable[[Any], Tensor], batch: Any) -> Tensor:
        """Returns encode(batch)."""
        return encode(batch)


def wrap(model: nn.Module) -> dict[str, DistributedDataParallel]:
    """Returns a wrapper of each tower that trains, by "image" and "text"; {} with one rank.

    wrapper(encode, batch) calls encode(batch); backward then averages the tower's gradients. What
    trains gets the first rank's values. All ranks have to call `wrap`.
    """
    if ranks.count() == 1:
        return {}
    towers: dict[str, list[nn.Parameter]] = {"image": [], "text": []}
    for name, parameter in model.named_parameters():
        if name in SCALARS:
            distributed.from_first_rank([parameter], _everyone())
        elif parameter.requires_grad:
            towers[tower_of(name)].append(parameter)
    trained = {name: _Weights(parameters) for name, parameters in towers.items() if parameters}
    # A tower may have parameters that no feature depends on, for which torch searches.
    # `gradient_cache` takes a single wrapper for one of both towers, in which it allows no such
    # parameters.
    search = len(trained) > 1
    return {
        name: DistributedDataParallel(weights, find_unused_parameters=search)
        for name, weights in trained.items()
    }


def _everyone() -> dist.ProcessGroup:
    """Returns the group of all ranks, which have joined."""
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def average_gradient(scale: Scale) -> Scale:
    """Returns logit scale or bias; backward averages its gradient over the ranks. None for None.

    All ranks have to run backward. With one rank, or if it does not train, it is returned as it is.
    """
    if ranks.count() == 1 or scale is None or not scale.requires_grad:
        return scale
    return distributed.average_gradients_over_ranks([scale], _everyone())[0]
