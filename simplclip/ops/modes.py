"""The modes that torch may be in around a call: autocast, and those of derivatives.

The ops cast their arguments as autocast asks, and their kernels run without it. They have first
derivatives in reverse mode; other derivatives raise an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

FIRST_ORDER = (
    "{op}: expected a first derivative in reverse mode, got {got}; the ops have no other "
    "derivatives"
)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is enabled for the device's type; False for meta, where torch raises."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Returns a context without autocast for the device's type; for meta it does nothing."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def autocast(first: Tensor, *others: Tensor | None) -> Sequence[Any]:
    """Returns the tensors, cast to autocast's dtype if it is on; not float64 and None."""
    tensors = (first, *others)
    if not autocasts(first.device):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    cast = []
    for t in tensors:
        if isinstance(t, Tensor) and t.dtype != torch.float64:
            t = t.to(dtype)
        cast.append(t)
    return cast


def has_values(t: Any) -> bool:
    """Whether a tensor's values can be read: not of meta and fake ones. Not for compiled code."""
    if type(t) is not Tensor or t.is_meta:
        return False
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None


def transforms() -> set[str]:
    """Returns the transforms of torch.func around the present call: "grad", "jvp", "vmap"."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return set()
    return {level.key().name.lower() for level in torch._C._functorch.get_interpreter_stack()}


def is_transformed() -> bool:
    """Whether the present call is one of forward mode or of a transform of torch.func."""
    return (
        forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
    )


def check_reverse_mode(name: str, values: Sequence, *, vmap: bool = True) -> None:
    """Raises NotImplementedError under torch.func.grad and in forward mode.

    There torch would return derivatives of zero. vmap: whether torch.vmap is supported.
    """
    got = None
    unsupported = {"grad", "jvp"} if vmap else {"grad", "jvp", "vmap"}
    unsupported &= transforms()
    if unsupported:
        got = f"torch.func.{min(unsupported)}"
    elif forward_ad._current_level >= 0:
        tensors = [value for value in values if isinstance(value, Tensor)]
        if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            got = "a forward-mode tangent"
    if got:
        raise NotImplementedError(FIRST_ORDER.format(op=name, got=got))


def first_order_only(
    name: str, gradients: Sequence[Tensor | None], *sources: Tensor | None
) -> tuple[Any, ...]:
    """Returns the gradients, but so that differentiating them again raises an error.

    Autograd runs a node only if the node lies on a path to a tensor whose gradient is asked for. So
    the node that raises has the sources as inputs: the tensors that the gradients were computed
    from, or a result of the op that depends on these.
    """
    message = FIRST_ORDER.format(op=name, got="a double backward")
    node: Any = torch._C._functions.DelayedError(message.encode(), len(gradients) + len(sources))
    return node(*gradients, *sources)[: len(gradients)]


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward may follow; True under torch.func, which hides what requires one."""
    if not torch.is_grad_enabled():
        return False
    for t in tensors:
        if t is not None and t.requires_grad:
            return True
    return (
        not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is not None
    )
