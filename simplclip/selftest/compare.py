"""Comparison of a call's results and gradients with float64.

The rule: |kernel - float64| <= |plain torch in the same dtype - float64| + eps, with eps relative
to the largest value of the float64 result. The first term lets a kernel round as plain torch
rounds; the second is what reordering a sum may cost in that dtype. (The rule of ml-cross-entropy's
tests.)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from simplclip import ops
from simplclip.ops import backends
from simplclip.selftest.calls import Call

TF32 = "tf32"  # in place of a dtype: float32 whose products may round to TF32
Kind = torch.dtype | str
EPS: dict[Kind, float] = {
    torch.float64: 1e-10,
    torch.float32: 5e-4,
    TF32: 2e-3,
    torch.float16: 1e-3,
    torch.bfloat16: 1e-2,
}
# A loss's incoming gradient, like a GradScaler's, so that half types can hold outgoing gradients.
LOSS_SCALE = 64.0
# So many times the effect of rounding the inputs is allowed too, for results that nearly cancel.
ROUNDINGS = 8
Results = dict[str, Tensor]
Incoming = Callable[[str, Tensor], Tensor]  # of a result's name, the gradient that enters it


def forced(backend: str | dict[str, str]) -> contextlib.AbstractContextManager:
    """Context that forces a backend, or backends of single ops; "" forces none."""
    if isinstance(backend, dict):
        return backends.backend(**backend)
    return backends.backend(backend or None)


def outputs_of(function: Callable, call: Call, tensors: dict[str, Tensor]) -> Results:
    """Calls an op with these tensors; a result that is no dict is named "out"."""
    out = function(**call.arguments(tensors))
    return out if isinstance(out, dict) else {"out": out}


def run(
    function: Callable,
    call: Call,
    tensors: dict[str, Tensor],
    need: Iterable[str],
    incoming: Incoming,
) -> Results:
    """Returns results, and gradients of `need` as d_NAME."""
    need = list(need)
    leaves = {name: t.detach().requires_grad_(name in need) for name, t in tensors.items()}
    outputs = outputs_of(function, call, leaves)
    gradients = {name: torch.zeros_like(tensors[name]) for name in need}
    entering = {name: incoming(name, t) for name, t in outputs.items() if t.requires_grad}
    if entering:
        sources = [outputs[name] for name in entering]
        inputs = [leaves[name] for name in need]
        computed = torch.autograd.grad(
            sources, inputs, list(entering.values()), allow_unused=True, materialize_grads=True
        )
        gradients = dict(zip(need, computed))
    results = {name: t.detach() for name, t in outputs.items()}
    return results | {f"d_{name}": gradients[name] for name in need}


def least_size(call: Call, name: str) -> float:
    """Returns the least size that a result is assumed to have: a smaller one is a cancellation.

    This size is a few hundredths of the terms: logits, or scale / N for gradients.
    """
    gradient = name.startswith("d_")
    if call.op == "feature_loss":
        return min(1e-2, LOSS_SCALE / call.tensors["teacher"].numel()) if gradient else 1e-2
    if call.op == "simplified_block":  # its results are sums over tokens and widths
        return 0.3
    if call.op != "similarity_loss":
        return 0.1
    arguments = call.tensors | call.options
    scale = max(abs(float(arguments.get(name, 1))) for name in ("logit_scale", "teacher_scale"))
    if gradient:
        return max(scale, 1) * (0.05 * LOSS_SCALE / call.tensors["image"].shape[0])
    return max(scale, 1) * 0.01


def error_of(result: Tensor, exact: Tensor) -> float:
    """Returns the largest error; NaN for another shape."""
    if result.shape != exact.shape:
        return math.nan
    return (result.cpu().double() - exact).abs().max().item()


@dataclass
class Error:
    """The error of a result, and what is allowed."""

    name: str
    error: float
    plain: float  # plain torch's
    allowed: float

    @property
    def right(self) -> bool:
        """Whether the error is a number, and within the tolerance."""
        return self.error <= self.allowed

    @property
    def share(self) -> float:
        """The error in parts of what is allowed; at most 1e9, also for NaN."""
        return 1e9 if math.isnan(self.error) else min(self.error / self.allowed, 1e9)

    def __str__(self) -> str:
        return f"{self.name}: error {self.error:.2e}, allowed {self.allowed:.2e}"


def errors_of(
    results: Results,
    plain: Results,
    exact: Results,
    kind: Kind,
    least: Callable[[str], float],
    rounded: Callable[[], list[Results]] | None = None,
) -> list[Error]:
    """Returns the error of each result by the rule above, against float64's `exact`.

    rounded: returns results for rounded inputs, whose errors are allowed where one is not without.
    """
    assert results.keys() == plain.keys() == exact.keys()
    rounded_results: list[Results] = []
    errors = []
    for name, value in exact.items():
        size = max(value.abs().max().item(), least(name))
        plain_error = error_of(plain[name], value)
        allowed = EPS[kind] * size + 1e-30
        if plain_error < math.inf:  # plain sums overflow in float16
            allowed += plain_error
        error = Error(name, error_of(results[name], value), plain_error, allowed)
        if rounded is not None and error.error > allowed:
            rounded_results = rounded_results or rounded()
            rounding_error = max(error_of(other[name], value) for other in rounded_results)
            error.allowed = max(allowed, ROUNDINGS * rounding_error)
        errors.append(error)
    return errors


def spread(t: Tensor) -> Tensor:
    """Returns a view of equal values whose rows lie between NaNs, in new memory.

    A tensor of fewer than two dimensions is returned as it is.
    """
    if t.dim() < 2:
        return t
    *sizes, width = t.shape
    padded = t.new_full((*sizes, 2 * width + 1), math.nan)
    return padded[..., :width].copy_(t)


@dataclass
class Case:
    """A call in a dtype on a device, with tensors whose rows lie between NaNs.

    need: tensors whose gradients are computed. size: of the incoming gradients of losses.
    """

    call: Call
    dtype: torch.dtype
    backend: str | dict[str, str]
    need: list[str]
    seed: int = 0
    size: float = LOSS_SCALE
    device: str | torch.device = "cpu"
    tf32: bool = False
    tensors: dict[str, Tensor] = field(init=False)  # inputs of the op
    grads: dict[str, Tensor] = field(init=False, default_factory=dict)  # incoming gradients

    def __post_init__(self) -> None:
        self.tensors = {
            name: self.lay_out(name, t.to(self.device))
            for name, t in self.call.typed(self.dtype).items()
        }

    def lay_out(self, name: str, t: Tensor) -> Tensor:
        """Returns an input, or as "grad NAME" an incoming gradient, in its memory layout."""
        return t if name.startswith("grad ") or not t.is_floating_point() else spread(t)

    def incoming(self, name: str, result: Tensor) -> Tensor:
        """Returns the gradient that enters a result, the same for each run."""
        if name not in self.grads:
            grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(self.seed))
            grad = grad.to(self.device, self.dtype)
            if result.dim() == 0:
                grad = grad * self.size
            self.grads[name] = self.lay_out(f"grad {name}", grad.to(result.dtype))
        return self.grads[name]

    def run(self, function: Callable | None = None) -> Results:
        """Runs the op on the backend. function: the op in another form, e.g. compiled."""
        function = function or getattr(ops, self.call.op)
        with forced(self.backend):
            return run(function, self.call, self.tensors, self.need, self.incoming)

    def defined(self, tensors: dict[str, Tensor], incoming: Incoming) -> Results:
        """Returns plain torch's results, here of the backend "reference"."""
        with forced("reference"):
            return run(getattr(ops, self.call.op), self.call, tensors, self.need, incoming)

    def by_definition(self, change: Callable[[Tensor], Tensor] = lambda t: t) -> Results:
        """Returns plain torch's results, with inputs and incoming gradients changed by `change`."""

        def changed(t: Tensor) -> Tensor:  # on the CPU, contiguous and without negative bits
            t = t.detach().cpu().resolve_neg().contiguous()
            return change(t) if t.is_floating_point() else t

        def incoming(name: str, result: Tensor) -> Tensor:
            return changed(self.grads[name]).to(result.dtype)

        return self.defined({name: changed(t) for name, t in self.tensors.items()}, incoming)

    def rounded_otherwise(self, seed: int) -> Results:
        """Returns float64's results after a rounding error of the dtype in every number of inputs
        and gradients.
        """
        g = torch.Generator().manual_seed(seed)
        rounding = 2.0**-11 if self.tf32 else torch.finfo(self.dtype).eps / 2

        def rounded(t: Tensor) -> Tensor:
            sign = 2 * torch.randint(0, 2, t.shape, generator=g) - 1
            return t.double() * (1 + rounding * sign)

        return self.by_definition(rounded)

    def errors(self, results: Results, *, roundings: bool = True) -> list[Error]:
        """Returns the error of each result of `run`.

        roundings: also allow the effect of rounding the inputs.
        """

        def rounded() -> list[Results]:
            return [self.rounded_otherwise(seed) for seed in range(4)]

        return errors_of(
            results,
            self.by_definition(),
            self.by_definition(Tensor.double),
            TF32 if self.tf32 else self.dtype,
            partial(least_size, self.call),
            rounded if roundings else None,
        )
