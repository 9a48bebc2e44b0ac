"""Collectives of the losses: ranks exchange features and column statistics, never logits.

torch.distributed.nn.functional has such collectives with gradients, but it is deprecated in torch
2.15 and cannot be traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional

from simplclip.calls.fields import accumulate_dtype
from simplclip.ops.checks import FLOATS
from simplclip.ops.modes import autocasts

# While torch 2.11 traces an autograd.Function, it treats tensors that are written in place as
# constants. So traced code uses the collectives that return a tensor. torch 2.15 has renamed one of
# these collectives.
_all_gather_traced = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor


def _all_gather(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns the rows [N, ...] of all W ranks in order, [W N, ...]; N is equal on every rank."""
    if torch.compiler.is_compiling():
        return _all_gather_traced(rows.contiguous(), 0, group)
    out = rows.new_empty(dist.get_world_size(group) * rows.shape[0], *rows.shape[1:])
    dist.all_gather_into_tensor(out, rows.contiguous(), group=group)
    return out


def _all_to_all(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sends part r of `parts` [W, ...] to rank r; returns the parts [W, ...] sent to this rank."""
    parts = parts.contiguous()
    if torch.compiler.is_compiling():
        return functional.all_to_all_single(parts, None, None, group)
    out = torch.empty_like(parts)
    dist.all_to_all_single(out, parts, group=group)
    return out


class _Gather(torch.autograd.Function):
    """All-gather. Its gradient is _Sum, whose gradient is _Gather: backward is differentiable."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(rows, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _differentiable(_Sum, _reduce_scatter)(gradient, ctx.group), None


class _Sum(torch.autograd.Function):
    """`_reduce_scatter`, whose gradient is an all-gather."""

    @staticmethod
    def forward(ctx: Any, gathered: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter(gathered, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _differentiable(_Gather, _all_gather)(gradient, ctx.group), None


def _reduce_scatter(gathered: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns this rank's rows [N, ...], summed over `gathered` [W N, ...] of the W ranks."""
    world = dist.get_world_size(group)
    # A reduce-scatter takes less memory than the exchange below, but gloo can sum few dtypes.
    if dist.get_backend(group) == "nccl" and not torch.compiler.is_compiling():
        shard = gathered.new_empty(gathered.shape[0] // world, *gathered.shape[1:])
        dist.reduce_scatter_tensor(shard, gathered.contiguous(), group=group)
        return shard
    return _all_to_all(gathered.unflatten(0, (world, -1)), group).sum(0)


def _differentiable(function: type[torch.autograd.Function], plain: Callable) -> Callable:
    """Returns `function.apply` under create_graph=True, otherwise `plain`, which does the same."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return function.apply
    return plain


def gather(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gathers rows [N, ...] of W ranks to [W N, ...]; backward sums the gradient over ranks."""
    return _Gather.apply(rows, group)


def _group(name: Any) -> dist.ProcessGroup:
    """Returns the process group of a name, which is its form in an op's schema."""
    return dist.distributed_c10d._resolve_process_group(name)


def exchange_columns(columns: Tensor, group: str) -> Tensor:
    """Exchanges column statistics, S a column, among W ranks: [S, W N] -> [W, S, N].

    columns: of all columns over this rank's rows. The result: of its columns over each rank's rows.
    group: a name.
    """
    named = _group(group)
    parts = columns.unflatten(1, (dist.get_world_size(named), -1)).transpose(0, 1)
    return _all_to_all(parts, named)


def exchange_parts(parts: Tensor, group: str) -> Tensor:
    """Does the reverse of `exchange_columns`, and so passes gradients: [W, S, N] -> [S, W N]."""
    return _all_to_all(parts, _group(group)).transpose(0, 1).flatten(1).contiguous()


class SameShapes:
    """A check that tensors have equal shapes and dtypes on all ranks; else NCCL would hang.

    Every call gathers four integers a tensor, but on a GPU, where reading them waits, a rank reads
    them only at the first call and after its own have changed. Compiled code checks nothing.
    """

    def __init__(self) -> None:
        self.layouts: list | None = None
        self.numbers: list[int] = []
        self.sent = torch.empty(0)

    def check(self, tensors: Mapping[str, Any], group: dist.ProcessGroup) -> None:
        """Raises ValueError if a tensor, by its name, has another shape or dtype on another rank.

        A collective. tensors: as many on every rank; anything but a tensor counts as none.
        """
        if torch.compiler.is_compiling():
            return
        device = None
        layouts: list = []
        for t in tensors.values():
            if isinstance(t, Tensor):
                device = device or t.device
                layouts += t.shape, t.dtype
            else:
                layouts += None, None
        if device is None:
            return
        layouts.append(torch.get_autocast_dtype(device.type) if autocasts(device) else None)
        new = layouts != self.layouts or self.sent.device != device
        if new:
            self.layouts = layouts
            *pairs, cast_to = layouts
            described = [_numbers(*pair, cast_to) for pair in zip(pairs[::2], pairs[1::2])]
            self.numbers = [number for numbers in described for number in numbers]
            self.sent = torch.tensor(self.numbers, device=device)
        world = dist.get_world_size(group)
        received = self.sent.new_empty(world * len(self.numbers))
        dist.all_gather_into_tensor(received, self.sent, group=group)
        if new or device.type == "cpu":
            numbers = received.tolist()
            if numbers != self.numbers * world:
                self.layouts = None  # so that the next call reads the shapes again
                raise ValueError(_unequal(list(tensors), numbers))


_NONE = [-1, 0, 0, 0]  # of no tensor


def _numbers(shape: tuple[int, ...] | None, dtype: Any, cast_to: Any) -> list[int]:
    """Returns dimensions, two sizes and a number of the dtype that autocast makes of it."""
    if shape is None:
        return _NONE
    kind = len(FLOATS)  # any dtype of ids
    if dtype in FLOATS:
        kind = FLOATS.index(dtype if cast_to is None or dtype == torch.float64 else cast_to)
    return [len(shape), *(*shape, 0, 0)[:2], kind]


def _unequal(names: list[str], numbers: list[int]) -> str:
    """Returns the message that named tensors, of which each rank has `_numbers`, differ."""
    described = [numbers[start : start + 4] for start in range(0, len(numbers), 4)]
    ranks = [
        described[start : start + len(names)] for start in range(0, len(described), len(names))
    ]
    differ = [i for i in range(len(names)) if any(rank[i] != ranks[0][i] for rank in ranks)]
    got = [
        f"rank {rank}: {', '.join(_shown(*tensors[i]) for i in differ)}"
        for rank, tensors in enumerate(ranks)
    ]
    return (
        f"{', '.join(names[i] for i in differ)}: expected the same shapes and dtypes on all ranks, "
        f"got {'; '.join(got)}"
    )


def _shown(dimensions: int, rows: int, columns: int, kind: int) -> str:
    """Returns the text of a tensor's `_numbers`, e.g. "float32 [4, 8]"."""
    if dimensions < 0:
        return "none"
    dtype = str(FLOATS[kind]).removeprefix("torch.") if kind < len(FLOATS) else "integers"
    return f"{dtype} {[rows, columns][:dimensions]}"


# of calls that have no SameShapes of their own
_shapes: WeakKeyDictionary[dist.ProcessGroup, SameShapes] = WeakKeyDictionary()


def check_equal_shapes(tensors: Mapping[str, Any], group: Any) -> None:
    """Checks tensors by `SameShapes.check`, a collective, if the group is a process group."""
    if not torch.compiler.is_compiling() and isinstance(group, dist.ProcessGroup):
        _shapes.setdefault(group, SameShapes()).check(tensors, group)


def _all_reduce_mean(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns the mean over the group's ranks, a new tensor; a collective without gradients."""
    if torch.compiler.is_compiling():
        return functional.all_reduce(value, "sum", group) / dist.get_world_size(group)
    value = value.clone()
    dist.all_reduce(value, group=group)
    return value / dist.get_world_size(group)


class _Mean(torch.autograd.Function):
    """The mean over the ranks, whose gradient is passed on unchanged."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _all_reduce_mean(value, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def mean_over_ranks(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns the mean over ranks, whose gradient passes to this rank's value unchanged."""
    return _Mean.apply(value, group)


class _Average(torch.autograd.Function):
    """The mean over the ranks, whose gradient is averaged over the ranks too."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_reduce_mean(value, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _differentiable(_Average, _all_reduce_mean)(gradient, ctx.group), None


class _Learned(torch.autograd.Function):
    """The parameters as they are, whose gradients are averaged over the ranks."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(p.view_as(p) for p in parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat = torch.cat([g.flatten().to(accumulate_dtype(g.dtype)) for g in gradients])
        flat = _differentiable(_Average, _all_reduce_mean)(flat, ctx.group)
        parts = flat.split([g.numel() for g in gradients])
        return None, *(part.view_as(g).to(g.dtype) for part, g in zip(parts, gradients))


def average_gradients_over_ranks(
    parameters: Sequence[Tensor], group: dist.ProcessGroup
) -> tuple[Tensor, ...]:
    """Returns views of the parameters; backward averages their gradients over the ranks.

    By one all-reduce. DistributedDataParallel may average them again: equal ones stay the same.
    """
    if len(parameters) == 0:
        return ()
    return _Learned.apply(group, *parameters)


def from_first_rank(tensors: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Overwrites the tensors in place by those of the group's first rank: a broadcast of each."""
    for tensor in tensors:
        dist.broadcast(tensor.detach(), group=group, group_src=0)


class _ScaleGradient(torch.autograd.Function):
    """The value as it is, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * gradient, None


def scale_gradient(value: Tensor, factor: float) -> Tensor:
    """Returns a view of `value`; backward multiplies its gradient by `factor`."""
    return _ScaleGradient.apply(value, factor)
