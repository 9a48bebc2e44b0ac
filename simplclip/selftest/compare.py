"""Comparison of a call's results and gradients with its definition in float64.

The rule: |kernel - float64| <= |plain torch in the same dtype - float64| + eps, with eps relative to the largest value of the
float64 result. The first term lets a kernel round as plain torch rounds; the second is what reordering a sum may cost in that
dtype. (The rule of ml-cross-entropy's tests.)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from simplclip import ops
from simplclip.ops import backends
from simplclip.selftest.calls import Call

TF32 = "tf32"  # products round their inputs to it; it has the mantissa of float16
EPS: dict[Any, float] = {torch.float32: 5e-4, torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.float64: 1e-10, TF32: 2e-3}
LOSS_SCALE = 64.0  # of a loss's incoming gradients, like a GradScaler's, so that half types can hold outgoing gradients
SLACK = 4  # times eps, but for float32 and float64: backends round between products, where the definition keeps float32
ROUNDINGS = 8  # times the effect of rounding the inputs: an error that is allowed too, for results that nearly cancel

Function = Callable[..., Any]


def forced(backend: str) -> contextlib.AbstractContextManager:
    """Context that forces a backend; "" forces none, so that the first backend that can run a call runs it."""
    return backends.backend(backend) if backend else contextlib.nullcontext()


def function_of(call: Call) -> Function:
    return getattr(ops, call.op)


def definition_of(call: Call) -> Function:
    def function(**arguments):
        with backends.backend("reference"):  # differentiated by autograd
            return function_of(call)(**arguments)

    return function


def outputs_of(function: Function, call: Call, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out = function(**call.arguments(tensors))
    return out if isinstance(out, dict) else {"out": out}


def run(
    function: Function,
    call: Call,
    tensors: dict[str, Tensor],
    need: Iterable[str],
    incoming: Callable[[str, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Returns results, and gradients of `need` as d_NAME. incoming(name, result): the gradient that enters a result."""
    need = list(need)
    leaves = {name: t.detach().requires_grad_(name in need) for name, t in tensors.items()}
    outputs = outputs_of(function, call, leaves)
    found = {name: t.detach() for name, t in outputs.items()}
    if need:
        come = [incoming(name, t) for name, t in outputs.items()]
        differentiable = [(t, g) for t, g in zip(outputs.values(), come) if t.requires_grad]
        grads: Any = [None] * len(need)
        if differentiable:
            results, gradients = zip(*differentiable)
            grads = torch.autograd.grad(results, [leaves[name] for name in need], gradients, allow_unused=True)
        for name, grad in zip(need, grads):
            found[f"d_{name}"] = torch.zeros_like(tensors[name]) if grad is None else grad
    return found


def _least(call: Call, gradient: bool) -> float:
    """Returns the least size that a result is assumed to have, since a smaller result is a cancellation of larger terms.

    This size is a few hundredths of the terms: logits, or scale / N for gradients.
    """
    if call.op == "feature_loss":
        return min(1e-2, LOSS_SCALE / call.tensors["teacher"].numel() if gradient else 1.0)
    if call.op != "similarity_loss":
        return 0.3 if call.op == "simplified_block" else 0.1  # a block's are sums over tokens and widths
    given = {**call.tensors, **call.options}
    scale = max(abs(float(given.get(name, 1))) for name in ("logit_scale", "interactive_scale", "teacher_scale"))
    return max(scale, 1) * (0.05 * LOSS_SCALE / given["image"].shape[0] if gradient else 0.01)


@dataclass
class Deviation:
    error: float
    allowed: float
    plain: float  # the error of plain torch

    @property
    def units(self) -> float:
        """The error in units of the tolerance: at most 1 is right. A NaN is infinitely wrong."""
        return math.inf if math.isnan(self.error) else self.error / self.allowed

    def __str__(self) -> str:
        return f"error {self.error:.3e}, allowed {self.allowed:.3e} (plain torch {self.plain:.3e})"


def deviation(kernel: Tensor, plain: Tensor, exact: Tensor, eps: float, least: float = 0.0) -> Deviation:
    """Returns the deviation of a kernel's result, given plain torch's result in the same dtype and float64's.

    least: lower bound of the largest value, for results that are 0 by cancellation.
    """

    def error(t: Tensor) -> float:
        return (t.double() - exact).abs().max().item() if t.shape == exact.shape else math.inf

    ours, theirs = error(kernel), error(plain)
    return Deviation(ours, theirs + eps * max(exact.abs().max().item(), least) + 1e-30, theirs)


@dataclass
class Case:
    """A call in a dtype on a backend.

    size: scale of the incoming gradients of losses. lay_out(name, t): returns a view that the op gets in place of t; a
    gradient's name is "grad NAME".
    """

    call: Call
    dtype: torch.dtype
    backend: str
    need: list[str]
    seed: int = 0
    size: float = LOSS_SCALE
    device: str = "cpu"
    lay_out: Callable[[str, Tensor], Tensor] = lambda name, t: t
    tensors: dict[str, Tensor] = field(init=False)  # inputs of the op
    grads: dict[str, Tensor] = field(init=False, default_factory=dict)  # incoming gradients

    definition = staticmethod(definition_of)  # plain torch's function for a call
    slack = SLACK

    def __post_init__(self) -> None:
        self.tensors = {name: self.lay_out(name, t.to(self.device)) for name, t in self.call.typed(self.dtype).items()}

    @property
    def precision(self) -> Any:
        """The dtype, or TF32."""
        tf32 = self.device == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"
        return TF32 if tf32 and self.dtype == torch.float32 else self.dtype

    def incoming(self, name: str, result: Tensor) -> Tensor:
        if name not in self.grads:
            grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(self.seed))
            grad = grad.to(self.device, self.dtype) * (1 if result.dim() else self.size)
            self.grads[name] = self.lay_out(f"grad {name}", grad.to(result.dtype))
        return self.grads[name]

    def run(self) -> dict[str, Tensor]:
        with forced(self.backend):
            return run(function_of(self.call), self.call, self.tensors, self.need, self.incoming)

    def deviations(self, found: dict[str, Tensor], *, roundings: bool = True) -> Iterator[tuple[str, Deviation]]:
        """Yields the deviation of each result of `run`. roundings: whether to allow the effect of rounding the inputs."""
        function = self.definition(self.call)
        naive = {name: _plain(t) for name, t in self.tensors.items()}
        grads = {name: _plain(t) for name, t in self.grads.items()}
        truth = {name: _double(t) for name, t in naive.items()}

        def exactly(tensors: dict[str, Tensor], change: Callable[[Tensor], Tensor] = _double) -> dict[str, Tensor]:
            return run(function, self.call, tensors, self.need, lambda name, result: change(grads[name]))

        plain = run(function, self.call, naive, self.need, lambda name, result: grads[name].to(result.dtype))
        exact, precision = exactly(truth), self.precision
        eps = EPS[precision] * (1 if precision in (torch.float32, torch.float64) else self.slack)
        rounding = torch.finfo(torch.float16 if precision == TF32 else self.dtype).eps / 2

        def changed(number: int) -> dict[str, Tensor]:
            """Returns float64's results after a rounding error of the dtype in every number of inputs and gradients."""
            g = torch.Generator().manual_seed(number)

            def nearly(t: Tensor) -> Tensor:
                sign = torch.randint(0, 2, t.shape, generator=g) * 2 - 1
                return _double(t) * (1 + sign * rounding) if t.is_floating_point() else t

            return exactly({name: nearly(t) for name, t in truth.items()}, nearly)

        others: list[dict[str, Tensor]] = []
        for name, value in found.items():
            least = _least(self.call, name.startswith("d_"))
            of = deviation(value.cpu(), plain[name], exact[name], eps, least)
            if roundings and of.units > 1:
                others = others or [changed(number) for number in range(4)]
                change = max((other[name] - exact[name]).abs().max().item() for other in others)
                of.allowed = max(of.allowed, ROUNDINGS * change)
            yield name, of


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def _plain(t: Tensor) -> Tensor:
    """Returns a copy on the CPU, contiguous and without negative bits."""
    return t.detach().cpu().resolve_neg().clone(memory_format=torch.contiguous_format)
