"""Training of one model by several ranks: gradients averaged over the ranks, and batch norms with common statistics."""

from __future__ import annotations

from collections.abc import Callable
from itertools import compress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _take_tensors
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from simplclip.common import ranks
from simplclip.ops import distributed
from simplclip.train.config import ConfigError

Result = TypeVar("Result")
BUCKET_BYTES = 25 << 20  # of gradients that travel together, as in DistributedDataParallel
SYNCHRONISED = ("cuda",)  # devices for which torch has SyncBatchNorm


def share_norms(model: nn.Module, device: torch.device) -> None:
    """Makes training batch norms use the statistics of all ranks. Raises ConfigError on a CPU, where torch cannot do that."""
    from timm.layers import convert_sync_batchnorm  # unlike torch's own, it keeps timm's activations

    for at, parent in list(model.named_modules()) if ranks.count() > 1 else ():
        for name, norm in parent.named_children():
            if isinstance(norm, _BatchNorm) and norm.training and not isinstance(norm, SyncBatchNorm):
                if device.type not in SYNCHRONISED:
                    raise ConfigError(
                        f"model.freeze_norms: expected true for several ranks on a {device.type}, where their batch norms "
                        f"would drift; got false and {type(norm).__name__} '{at}.{name}' in training mode"
                    )
                setattr(parent, name, convert_sync_batchnorm(norm))


class _Towers(nn.Module):
    """The towers' parameters as one module for DistributedDataParallel; its forward calls the function that it is given."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.of_towers = nn.ParameterList(parameters)

    def forward(self, compute: Callable[[], Any]) -> Any:
        return compute()


class Together:
    """The averaging of gradients over the ranks: of the towers, logit scale and bias. All start with the first rank's values.

    Frozen parameters do not travel, and losses average the gradients of their own parameters. Parameters that a step does not
    use keep no gradient.

    at_once: a step has one backward pass, which exchanges gradients as it goes. Otherwise a step sums several passes and then
        calls `exchange`, since DistributedDataParallel with a static graph would exchange in the first pass.
    """

    def __init__(self, model: nn.Module, at_once: bool) -> None:
        self.ddp = None
        if ranks.count() == 1:
            return
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        distributed.from_first_rank(trained.values(), dist.group.WORLD)
        # Whether a step uses logit scale and bias depends on the terms' schedules; all steps use the same part of the towers.
        self.towers = [p for name, p in trained.items() if name not in ("logit_scale", "logit_bias")]
        if at_once:
            self.ddp = DistributedDataParallel(_Towers(self.towers), static_graph=True)

    def __call__(self, compute: Callable[[], Result]) -> Result:
        """Returns the result of `compute`, from which a backward pass exchanges gradients as it goes."""
        return self.ddp(compute) if self.ddp else compute()

    def learned(self, *scales: Tensor | None) -> tuple[Tensor | None, ...]:
        """Returns logit scale and bias (None stays None) such that their gradients are averaged over the ranks."""
        if ranks.count() == 1:
            return scales
        trains = [scale is not None and scale.requires_grad for scale in scales]
        averaged = iter(distributed.learned([*compress(scales, trains)], dist.group.WORLD))
        return tuple(next(averaged) if its else scale for scale, its in zip(scales, trains))

    def exchange(self) -> None:
        """Averages the towers' gradients, which the backward passes have summed, over the ranks."""
        if ranks.count() == 1 or self.ddp:
            return
        travelling = []
        for some in _take_tensors([p.grad for p in self.towers if p.grad is not None], BUCKET_BYTES):
            flat = torch.cat([gradient.flatten() for gradient in some]).div_(ranks.count())
            travelling.append((some, flat, dist.all_reduce(flat, async_op=True)))
        for some, flat, work in travelling:
            work.wait()
            for gradient, part in zip(some, flat.split([gradient.numel() for gradient in some])):
                gradient.copy_(part.view_as(gradient))
