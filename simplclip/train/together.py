"""How several ranks train one model: what trains in one module, and batch norms over all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from simplclip.common import ranks
from simplclip.train.config import ConfigError

Result = TypeVar("Result")


def share_norms(model: nn.Module, synchronise: bool) -> None:
    """Batch norms that train use the statistics of all ranks. Raises ConfigError for them unless `synchronise`."""
    from timm.layers import convert_sync_batchnorm  # of torch's own it keeps the class, of timm's the activation

    for at, parent in list(model.named_modules()) if ranks.count() > 1 else ():
        for name, norm in parent.named_children():
            if isinstance(norm, _BatchNorm) and norm.training and not isinstance(norm, SyncBatchNorm):
                if not synchronise:
                    raise ConfigError(
                        f"model.sync_norms: expected true, or model.freeze_norms=true, for several ranks, whose batch norms "
                        f"would drift; got false and {type(norm).__name__} '{at}.{name}' in training mode"
                    )
                setattr(parent, name, convert_sync_batchnorm(norm))


class _Trained(nn.Module):
    """All that trains, in one module so that nothing drifts. It computes what it is given to call."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parameters_of_parts = nn.ParameterList(p for part in parts for p in part.parameters() if p.requires_grad)
        self.never_used = nn.Parameter(torch.zeros(()))  # without one torch warns that it looked for unused parameters

    def forward(self, compute: Callable[[], Any]) -> Any:
        return compute()


class Together:
    """Averages the gradients of model and loss over the ranks; what trains starts as on the first one.

    Which parameters a step uses depends on the schedules of the terms; those that it does not use keep no gradient.
    """

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        self.ddp = DistributedDataParallel(_Trained(model, loss), find_unused_parameters=True) if ranks.count() > 1 else None

    def __call__(self, compute: Callable[[], Result]) -> Result:
        """What `compute` returns. Backward from it exchanges gradients as it goes."""
        return self.ddp(compute) if self.ddp else compute()

    def exchange(self) -> None:
        """One exchange of the gradients that backward passes outside of `__call__` have added up."""
        if self.ddp:
            used = [p for p in self.ddp.parameters() if p.grad is not None]
            self.ddp(lambda: 0 * torch.stack([p.sum() for p in used]).sum()).backward()
