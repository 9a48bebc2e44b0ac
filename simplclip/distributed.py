"""What the losses exchange between ranks: features and column statistics, never logits."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def gather(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[N, ...] of each rank -> [W N, ...] on every rank, in the order of ranks. The gradient is summed over the ranks."""
    if rows.requires_grad and torch.is_grad_enabled():
        from torch.distributed.nn.functional import all_gather

        return torch.cat(all_gather(rows.contiguous(), group))
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, rows.contiguous(), group)
    return torch.cat(parts)


def exchange(columns: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[S, W N], this rank's statistics of all columns -> [W, S, N], every rank's statistics of this rank's columns."""
    from torch.distributed.nn.functional import all_to_all_single

    send = columns.unflatten(1, (dist.get_world_size(group), -1)).transpose(0, 1).contiguous()
    return all_to_all_single(torch.empty_like(send), send, group=group)


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, group):
        out = value.clone()
        dist.all_reduce(out, group=group)
        return out / dist.get_world_size(group)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def mean(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The mean over the ranks; its gradient goes to this rank's value as it is."""
    return _Mean.apply(value, group)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, factor):
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.factor * gradient, None


def scale_gradient(value: Tensor, factor: float) -> Tensor:
    """`value`, whose gradient is multiplied by `factor`."""
    return _ScaleGradient.apply(value, factor)
