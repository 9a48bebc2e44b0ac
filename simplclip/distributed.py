"""What the losses exchange between ranks: features and column statistics, never logits. Differentiable."""

from __future__ import annotations

import torch
from torch import Tensor


def gather(rows: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """[N, ...] of each rank -> [W N, ...] on every rank, in the order of ranks. The gradient is summed over the ranks."""
    if rows.requires_grad and torch.is_grad_enabled():
        from torch.distributed.nn.functional import all_gather

        return torch.cat(all_gather(rows.contiguous(), group))
    parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, rows.contiguous(), group)
    return torch.cat(parts)


def exchange(columns: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """[S, W N], this rank's statistics of all columns -> [W, S, N], every rank's statistics of this rank's columns."""
    from torch.distributed.nn.functional import all_to_all_single

    world = torch.distributed.get_world_size(group)
    send = columns.unflatten(1, (world, -1)).transpose(0, 1).contiguous()
    return all_to_all_single(torch.empty_like(send), send, group=group)


def mean(value: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """The mean over ranks; no gradient."""
    value = value.detach().clone()
    torch.distributed.all_reduce(value, group=group)
    return value / torch.distributed.get_world_size(group)


class _MeanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, group):
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient):
        return mean(gradient, ctx.group), None


def mean_gradient(value: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """`value`, whose gradient is averaged over the ranks in backward."""
    return _MeanGradient.apply(value, group)
