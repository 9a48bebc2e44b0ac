"""A small call of each op and loss, and torch's rules of registration for the ops that it makes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from simplclip import losses, ops
from simplclip.common.terms import SWEPT as TERMS
from simplclip.nn import SimplifiedBlock
from simplclip.selftest.calls import (
    Call,
    attention_call,
    block_call,
    feature_call,
    mlp_call,
    number,
    similarity_call,
)
from simplclip.selftest.compare import forced
from support.losses import loss_inputs

Tensors = Callable[[int, torch.dtype], list[Tensor]]  # of a number of rows
Function = Callable[..., Tensor]  # of these tensors, whose result is a number


def _number(out: Tensor | dict[str, Tensor]) -> Tensor:
    """Returns a number that depends on every element, or the sum of losses."""
    if isinstance(out, dict):
        return out["loss"] if "loss" in out else sum(out.values())
    if out.dim() == 0:
        return out
    return out.to(torch.promote_types(out.dtype, torch.float32)).square().mean()


def small(
    make: Callable[..., Call], integers: Callable[[Tensor], dict[str, Tensor]] = lambda first: {}
) -> tuple[Tensors, Function]:
    """Returns the float tensors of a call (of rows and a seed), and a function of them.

    integers: returns the call's other tensors, from its first one.
    """
    one = make(2, seed=0)

    def tensors(n: int, dtype: torch.dtype) -> list[Tensor]:
        call = make(n, seed=int(torch.randint(1 << 30, ())))
        needed = call.needed()
        return [t.requires_grad_(name in needed) for name, t in call.typed(dtype).items()]

    def function(*tensors: Tensor) -> Tensor:
        named = dict(zip(one.tensors, tensors)) | integers(tensors[0])
        return _number(getattr(ops, one.op)(**one.arguments(named)))

    return tensors, function


def _similarity(n: int, seed: int, **options: Any) -> Call:
    options = {"terms": TERMS} | options
    return similarity_call(n, n, width=24, scale=10.0, seed=seed, **options)


def _attention(n: int, seed: int, **options: Any) -> Call:
    return attention_call(n, 5, 2, 8, seed=seed, **options)


def _block(n: int, seed: int, **options: Any) -> Call:
    return block_call(n, 5, 8, 2, 12, projections=False, seed=seed, **options)


def _projected(n: int, seed: int) -> Call:
    call = feature_call(n, 24, seed=seed, distance="smooth_l1")
    call.tensors["projection"] = torch.eye(24).double() + number(0.1)
    return call


def _ids(first: Tensor) -> dict[str, Tensor]:
    return {"ids": torch.arange(first.shape[0], device=first.device) // 2}


def _lengths(first: Tensor) -> dict[str, Tensor]:
    return {"lengths": torch.full((first.shape[0],), 3, device=first.device)}


SIGMOIDS = {"sigmoid": 1.0, "pair_matching": 0.5}
# A small call of each op: its float tensors, and a function of them that returns a number.
SMALL = {
    "similarity_loss": small(_similarity, _ids),
    "similarity_loss sigmoid": small(
        partial(_similarity, terms=tuple(SIGMOIDS), weights=SIGMOIDS, bias=-2.0), _ids
    ),
    "feature_loss": small(partial(feature_call, d=24)),
    "feature_loss projection": small(_projected),
    "shaped_attention": small(partial(_attention, causal=True)),
    "shaped_attention lengths": small(_attention, _lengths),
    "parallel_mlp": small(lambda n, seed: mlp_call(n, 8, 12, 8, seed)),
    "simplified_block": small(_block),
    "simplified_block recompute": small(partial(_block, recompute=True)),
}


def _tokens(n: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(n, 5, 16, dtype=torch.float64).to(dtype).requires_grad_()]


def _features(n: int, dtype: torch.dtype) -> list[Tensor]:
    """Returns image, text and logit_scale, then the teacher's."""
    student, teacher = loss_inputs(n, 24, dtype=dtype)
    return [*student[:3], *teacher]


WEIGHTS = {"interactive_weight": 1, "feature_weight": 1, "pm_weight": 1}
# name -> tensors, the module, and how many of the tensors the module takes.
MODULES = {
    "SimplifiedBlock": (_tokens, partial(SimplifiedBlock, 16, 2), 1),
    "ClipPMLoss": (_features, losses.ClipPMLoss, 3),
    "WIKDLoss": (_features, partial(losses.WIKDLoss, **WEIGHTS), 6),
    "MatryoshkaLoss": (_features, lambda: losses.MatryoshkaLoss(losses.ClipPMLoss(), (8, 24)), 3),
}


def module_call(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensors, Function]:
    """Returns tensors, and a function of them by the module: a block in `dtype`."""
    tensors, make, count = MODULES[name]
    module = make()
    if name == "SimplifiedBlock":
        module.to(dtype)

    def function(*args: Tensor) -> Tensor:
        out = module(*args[:count])
        return sum(out) if isinstance(out, tuple) else _number(out)

    return tensors, function


class Dispatched(TorchDispatchMode):
    """A mode that records the calls of simplclip's ops, with copies of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function.namespace == "simplclip":
            copies = [t.detach().clone() if isinstance(t, Tensor) else t for t in args]
            self.calls.append((function, copies))
        return function(*args, **(kwargs or {}))


def check_registration(name: str, backend: str, device: str = "cpu") -> None:
    """Checks schemas, autograd, and what fake functions promise, of forward and backward.

    Backward runs on the backend that comes first, except after "sdpa", whose forward keeps tensors
    in a layout of its own.
    """
    make, function = SMALL[name]
    first_backend = backend if backend == "sdpa" else ""
    tensors = [
        t.detach().to(device).requires_grad_(t.requires_grad) for t in make(4, torch.float32)
    ]
    with forced(first_backend), Dispatched() as mode, torch.device(device):
        function(*tensors).backward()
        with torch.no_grad():
            function(*tensors)
    for op, (*args, first) in mode.calls:
        forward = not op._opname.endswith("_bwd")
        for t in args:
            if isinstance(t, Tensor) and forward:
                t.requires_grad_(t.is_floating_point())
        # Not "test_aot_dispatch_dynamic": it compares h after backward, which has written over it.
        # test_compile.py traces.
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(
            op, (*args, backend if forward else first), test_utils=checks, rtol=1e-4, atol=1e-5
        )
