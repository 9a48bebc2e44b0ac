"""Comparison of a call's results and gradients with its definition in float64, plain.py's.

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
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import simplclip
from simplclip import ops
from support.ops import layouts, plain
from support.ops.calls import Call, attention_call, of_lengths
from support.ops.plain import ProductsInTF32

EPS: dict[Any, float] = {
    torch.float64: 1e-10,
    torch.float32: 5e-4,
    "tf32": 2e-3,
    torch.float16: 1e-3,
    torch.bfloat16: 1e-2,
}
# A loss's incoming gradient, like a GradScaler's, so that half types can hold outgoing gradients.
LOSS_SCALE = 64.0
# So many times the effect of rounding the inputs is allowed too, for results that nearly cancel.
ROUNDINGS = 8


def _plain_similarity(
    image: Tensor, text: Tensor, logit_scale: Tensor | float, **named: Any
) -> dict[str, Tensor]:
    """Computes plain torch's similarity loss with all numbers in the dtype of the features."""
    named.pop("scratch_bytes", None)
    named.pop("store_bytes", None)
    if named.get("ids") is not None and named.get("text_ids") is None:
        named["text_ids"] = named["ids"]

    def typed(t: Tensor) -> Tensor:
        return t.to(image.dtype) if t.is_floating_point() else t

    named = tree_map_only(Tensor, typed, {"logit_scale": logit_scale, **named})
    return plain.similarity_loss(image, text, **named)


PLAIN: dict[str, Callable] = {
    "similarity_loss": _plain_similarity,
    "shaped_attention": plain.shaped_attention,
    "parallel_mlp": plain.parallel_mlp,
    "simplified_block": lambda *, recompute=False, **named: plain.simplified_block(**named),
    "feature_loss": plain.feature_loss,
}


def forced(backend: str | dict[str, str]) -> contextlib.AbstractContextManager:
    """Context that forces a backend, or backends of single ops; "" forces none, so that the first
    backend that can run a call runs it.
    """
    if isinstance(backend, dict):
        return simplclip.backend(**backend)
    return simplclip.backend(backend) if backend else contextlib.nullcontext()


def function_of(call: Call) -> Callable:
    return getattr(ops, call.op)


def outputs_of(function: Callable, call: Call, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out = function(**call.arguments(tensors))
    return out if isinstance(out, dict) else {"out": out}


def run(
    function: Callable,
    call: Call,
    tensors: dict[str, Tensor],
    need: Iterable[str],
    incoming: Callable[[str, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Returns results, and gradients of `need` as d_NAME. incoming(name, result): the gradient that
    enters a result.
    """
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


def _least(call: Call, gradient: bool) -> float:
    """Returns the least size that a result is assumed to have, since a smaller result is a
    cancellation of larger terms.

    This size is a few hundredths of the terms: logits, or scale / N for gradients.
    """
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
    """Returns the largest error; infinity for a NaN or another shape."""
    if result.shape != exact.shape:
        return math.inf
    error = (result.cpu().double() - exact).abs().max().item()
    return math.inf if math.isnan(error) else error


def assert_within(
    results: dict[str, Tensor],
    plain_results: dict[str, Tensor],
    exact: dict[str, Tensor],
    dtype: Any,
    subject: object = "",
    least: float | Callable[[str], float] = 0.0,
    rounded: Callable[[], list[dict[str, Tensor]]] | None = None,
) -> dict[str, float]:
    """Checks results by the rule above. Returns each result's error, in parts of what is allowed.

    plain_results: of plain torch in `dtype`, a key of EPS. exact: float64's. subject: named in the
    error. least: the least size that a result is assumed to have, also as a function of its name,
    for results that are 0 by cancellation. rounded: returns results for rounded inputs, whose
    errors are allowed too.
    """
    assert results.keys() == plain_results.keys() == exact.keys()
    rounded_results, shares = None, {}
    for name, value in exact.items():
        least_size = least(name) if callable(least) else least
        size = max(value.abs().max().item(), least_size)
        error = error_of(results[name], value)
        plain_error = error_of(plain_results[name], value)
        allowed = EPS[dtype] * size + 1e-30
        if plain_error < math.inf:  # plain sums overflow in float16
            allowed = plain_error + EPS[dtype] * size + 1e-30
        if rounded is not None and error > allowed:
            if rounded_results is None:
                rounded_results = rounded()
            rounding_error = max(error_of(other[name], value) for other in rounded_results)
            allowed = max(allowed, ROUNDINGS * rounding_error)
        assert error <= allowed, (
            f"{subject} {name}: error {error:.3e}, allowed {allowed:.3e} (plain torch "
            f"{plain_error:.3e})"
        )
        shares[name] = error / allowed
    return shares


@dataclass
class Case:
    """A call in a dtype on a backend.

    size: scale of the incoming gradients of losses. layouts: memory layouts of tensors, and of
    incoming gradients as "grad NAME", by their names in layouts.py.
    """

    call: Call
    dtype: torch.dtype
    backend: str | dict[str, str]
    need: list[str]
    seed: int = 0
    size: float = LOSS_SCALE
    device: str = "cpu"
    tf32: bool = False  # whether products of float32 are in TF32, so that plain torch's are too
    layouts: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(init=False)  # inputs of the op
    grads: dict[str, Tensor] = field(init=False, default_factory=dict)  # incoming gradients

    def __post_init__(self) -> None:
        self.tensors = {
            name: self.lay_out(name, t.to(self.device))
            for name, t in self.call.typed(self.dtype).items()
        }

    def __str__(self) -> str:
        backend = self.backend or "the first backend"
        return (
            f"{self.dtype} on {backend}, {self.call}; layouts {self.layouts}; gradients of "
            f"{self.need}"
        )

    def lay_out(self, name: str, t: Tensor) -> Tensor:
        if name not in self.layouts:
            return t
        view = layouts.ALL[self.layouts[name]](t)
        return t if view is None else view

    def incoming(self, name: str, result: Tensor) -> Tensor:
        if name not in self.grads:
            grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(self.seed))
            grad = grad.to(self.device, self.dtype)
            if result.dim() == 0:
                grad = grad * self.size
            self.grads[name] = self.lay_out(f"grad {name}", grad.to(result.dtype))
        return self.grads[name]

    def run(self) -> dict[str, Tensor]:
        with forced(self.backend):
            return run(function_of(self.call), self.call, self.tensors, self.need, self.incoming)

    def by_definition(self, change: Callable[[Tensor], Tensor] = lambda t: t) -> dict[str, Tensor]:
        """Returns plain torch's results, with inputs and incoming gradients changed by `change`."""

        def changed(t: Tensor) -> Tensor:  # on the CPU, contiguous and without negative bits
            t = t.detach().cpu().resolve_neg().contiguous()
            return change(t) if t.is_floating_point() else t

        tensors = {name: changed(t) for name, t in self.tensors.items()}
        incoming = lambda name, result: changed(self.grads[name]).to(result.dtype)  # noqa: E731
        return run(PLAIN[self.call.op], self.call, tensors, self.need, incoming)

    def rounded_otherwise(self, seed: int) -> dict[str, Tensor]:
        """Returns float64's results after a rounding error of the dtype in every number of inputs
        and gradients.
        """
        g = torch.Generator().manual_seed(seed)
        rounding = 2.0**-11 if self.tf32 else torch.finfo(self.dtype).eps / 2

        def rounded(t: Tensor) -> Tensor:
            sign = 2 * torch.randint(0, 2, t.shape, generator=g) - 1
            return t.double() * (1 + rounding * sign)

        return self.by_definition(rounded)

    def check(self, *, roundings: bool = False, twice: bool = False) -> dict[str, float]:
        """Checks that results and gradients are within the tolerance. Returns the errors, in parts
        of what is allowed.

        roundings: also allow the effect of rounding the inputs. twice: a second run must give the
        same bits.
        """
        results = self.run()
        if twice:
            for name, value in self.run().items():
                message = f"{name}: a second run gave other values, or NaN"
                assert torch.equal(value, results[name]), message
        kind: Any = self.dtype
        context: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self.tf32:
            kind, context = "tf32", ProductsInTF32()
        with context:
            plain_results = self.by_definition()
        exact = self.by_definition(Tensor.double)

        def least(name: str) -> float:
            return _least(self.call, name.startswith("d_"))

        def rounded() -> list[dict[str, Tensor]]:
            return [self.rounded_otherwise(seed) for seed in range(4)]

        return assert_within(
            results,
            plain_results,
            exact,
            kind,
            subject=self.call.options,
            least=least,
            rounded=rounded if roundings else None,
        )


def check(
    call: Call,
    dtype: torch.dtype,
    backend: str,
    *,
    roundings: bool = False,
    twice: bool = False,
    **fields: Any,
) -> None:
    """Checks results of a call and gradients of all its inputs. fields: of the Case."""
    Case(call, dtype, backend, call.needed(), **fields).check(roundings=roundings, twice=twice)


def check_padding(
    dtype: torch.dtype, backend: str, causal: bool, device: str = "cpu", *, width: int = 4
) -> None:
    """Checks that padded tokens of shaped_attention are not read, and that their results and
    gradients are 0.
    """
    call = of_lengths(attention_call(3, k=width, causal=causal), [3, 0, 5])

    def padded_with(value: float) -> dict[str, Tensor]:
        def filled(t: Tensor) -> Tensor:
            t = t.clone()
            t[0, 3:], t[1] = value, value
            return t

        tensors = {name: t.to(device) for name, t in call.typed(dtype).items()}
        tensors |= {name: filled(tensors[name]) for name in "qkv"}
        incoming = lambda name, t: filled(torch.ones_like(t))  # noqa: E731
        return run(function_of(call), call, tensors, call.needed(), incoming)

    with simplclip.backend(backend):
        expected, results = padded_with(1.0), padded_with(torch.nan)
    for name, value in results.items():
        assert torch.equal(value, expected[name]), name
        if value.dim() == 4:
            assert not value[0, 3:].any(), name
            assert not value[1].any(), name
