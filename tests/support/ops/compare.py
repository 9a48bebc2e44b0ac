"""Comparison of results and gradients with the definition in plain.py, by selftest's rule."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import simplclip
from simplclip import ops, selftest
from simplclip.selftest.calls import Call, attention_call, of_lengths
from simplclip.selftest.compare import Incoming, Kind, Results, errors_of, run
from support.ops import layouts, plain
from support.ops.plain import ProductsInTF32


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


def function_of(call: Call) -> Callable:
    return getattr(ops, call.op)


def assert_within(
    results: Results,
    plain_results: Results,
    exact: Results,
    kind: Kind,
    subject: object = "",
    least: Callable[[str], float] = lambda name: 0.0,
) -> None:
    """Checks results by selftest's rule; see `errors_of`. subject: named in the error."""
    for error in errors_of(results, plain_results, exact, kind, least):
        assert error.right, f"{subject} {error} (plain torch {error.plain:.3e})"


@dataclass
class Case(selftest.Case):
    """A call in a dtype on a backend, whose definition is in plain.py.

    layouts: memory layouts of tensors, and of incoming gradients as "grad NAME", by their names in
    layouts.py. Plain torch's products are in TF32 if the op's are.
    """

    layouts: dict[str, str] = field(default_factory=dict)

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

    def defined(self, tensors: dict[str, Tensor], incoming: Incoming) -> Results:
        context: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self.tf32:
            context = ProductsInTF32()
        with context:
            return run(PLAIN[self.call.op], self.call, tensors, self.need, incoming)

    def check(self, *, roundings: bool = False, twice: bool = False) -> dict[str, float]:
        """Checks results and gradients; returns the errors, in parts of what is allowed.

        roundings: also allow the effect of rounding the inputs. twice: a second run has equal bits.
        """
        results = self.run()
        if twice:
            for name, value in self.run().items():
                message = f"{name}: a second run gave other values, or NaN"
                assert torch.equal(value, results[name]), message
        errors = self.errors(results, roundings=roundings)
        for error in errors:
            assert error.right, f"{self.call.options} {error} (plain torch {error.plain:.3e})"
        return {error.name: error.share for error in errors}


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
    """Checks that shaped_attention reads no padded tokens, whose results and gradients are 0."""
    call = of_lengths(attention_call(3, k=width, causal=causal), [3, 0, 5])

    def padded_with(value: float) -> dict[str, Tensor]:
        def filled(t: Tensor) -> Tensor:
            t = t.clone()
            t[0, 3:], t[1] = value, value
            return t

        tensors = {name: t.to(device) for name, t in call.typed(dtype).items()}
        tensors |= {name: filled(tensors[name]) for name in "qkv"}

        def incoming(name: str, result: Tensor) -> Tensor:
            return filled(torch.ones_like(result))

        return run(function_of(call), call, tensors, call.needed(), incoming)

    with simplclip.backend(backend):
        expected, results = padded_with(1.0), padded_with(torch.nan)
    for name, value in results.items():
        assert torch.equal(value, expected[name]), name
        if value.dim() == 4:
            assert not value[0, 3:].any(), name
            assert not value[1].any(), name
