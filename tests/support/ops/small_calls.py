"""A small call of each op and loss, and torch's rules of registration for the ops that it makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from simplclip import losses, ops
from simplclip.calls.similarity import TERMS
from simplclip.nn import SimplifiedBlock
from simplclip.selftest.calls import ATTENTION
from simplclip.selftest.compare import forced


def _random(shapes: Iterable[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def _features(n: int, dtype: torch.dtype) -> list[Tensor]:
    """Returns image, text, logit_scale, the teacher's image, text, scale.

    The student's tensors require gradients.
    """
    rows = [F.normalize(torch.randn(n, 24, dtype=torch.float64), dim=1).to(dtype) for _ in range(4)]
    wide = torch.promote_types(dtype, torch.float32)
    scale, teacher_scale = torch.tensor(10.0, dtype=wide), torch.tensor(15.0, dtype=wide)
    student = [t.requires_grad_() for t in (*rows[:2], scale)]
    return [*student, *rows[2:], teacher_scale]


def similarity(**options: Any) -> tuple[Callable, Callable]:
    def function(
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        teacher_image: Tensor,
        teacher_text: Tensor,
        teacher_scale: Tensor,
    ) -> Tensor:
        ids = torch.arange(image.shape[0]) // 2
        call = {"terms": TERMS, "plane": (scale, -2.0), "ids": ids, **options}
        teacher = {
            "teacher_image": teacher_image,
            "teacher_text": teacher_text,
            "teacher_scale": teacher_scale,
        }
        out = ops.similarity_loss(image, text, scale, **call, **teacher)
        return out["loss"] if "loss" in out else sum(out.values())

    return _features, function


def _hadamard(image: Tensor, text: Tensor, scale: Tensor, *_: Tensor) -> Tensor:
    plane = (scale.expand(image.shape[1]), -2.0)
    out = ops.similarity_loss(image, text, scale, terms=("pair_matching",), plane=plane)
    return out["pair_matching"]


def _features_loss(
    image: Tensor, text: Tensor, _: Tensor, teacher: Tensor, *rest: Tensor
) -> Tensor:
    return ops.feature_loss(image, teacher)


def _projected(image: Tensor, text: Tensor, _: Tensor, teacher: Tensor, *rest: Tensor) -> Tensor:
    return ops.feature_loss(image, teacher, distance="smooth_l1", projection=text.T @ text)


def _number(out: Tensor) -> Tensor:
    """Returns a number that depends on every element."""
    return out.to(torch.promote_types(out.dtype, torch.float32)).square().mean()


def _attention_tensors(n: int, dtype: torch.dtype) -> list[Tensor]:
    return _random([(n, 5, 2, 8)] * 3 + [(2,)] * 3, dtype)


def _attention(q: Tensor, k: Tensor, v: Tensor, *gains: Tensor) -> Tensor:
    return _number(ops.shaped_attention(q, k, v, *gains, causal=True))


def _attention_of_lengths(q: Tensor, *rest: Tensor) -> Tensor:
    lengths = torch.full((q.shape[0],), 3, device=q.device)
    return _number(ops.shaped_attention(q, *rest, lengths=lengths))


def _mlp_tensors(n: int, dtype: torch.dtype) -> list[Tensor]:
    return _random(((n, 8), (12, 8), (12,), (8, 12), (8,)), dtype)


def _mlp(*args: Tensor) -> Tensor:
    return _number(ops.parallel_mlp(*args))


def _block(recompute: bool = False) -> tuple[Callable, Callable]:
    def function(x: Tensor, norm_weight: Tensor, *rest: Tensor) -> Tensor:
        options = dict(zip(ATTENTION[3:], rest[5:]), norm_weight=norm_weight, recompute=recompute)
        return _number(ops.simplified_block(x, *rest[:5], **options))

    def tensors(n: int, dtype: torch.dtype) -> list[Tensor]:
        shapes = ((n, 5, 8), (8,), (16, 8), (12, 8), (12,), (8, 12), (8,), (2,), (2,), (2,))
        return _random(shapes, dtype)

    return tensors, function


def _tokens(n: int, dtype: torch.dtype) -> list[Tensor]:
    return _random([(n, 5, 16)], dtype)


# A small call of each op: its float tensors, and a function of them that returns a number.
SMALL = {
    "similarity_loss": similarity(),
    "similarity_loss sigmoid": similarity(
        terms=("sigmoid", "pair_matching"), weights={"sigmoid": 1.0, "pair_matching": 0.5}
    ),
    "similarity_loss hadamard": (_features, _hadamard),
    "feature_loss": (_features, _features_loss),
    "feature_loss projection": (_features, _projected),
    "shaped_attention": (_attention_tensors, _attention),
    "shaped_attention lengths": (_attention_tensors, _attention_of_lengths),
    "parallel_mlp": (_mlp_tensors, _mlp),
    "simplified_block": _block(),
    "simplified_block recompute": _block(recompute=True),
}
WEIGHTS = {"interactive_weight": 1, "feature_weight": 1, "pm_weight": 1}
# name -> tensors, the module, and how many of the tensors the module takes.
MODULES = {
    "SimplifiedBlock": (_tokens, partial(SimplifiedBlock, 16, 2), 1),
    "ClipPMLoss": (_features, losses.ClipPMLoss, 3),
    "WIKDLoss": (_features, partial(losses.WIKDLoss, **WEIGHTS), 6),
    "MatryoshkaLoss": (_features, lambda: losses.MatryoshkaLoss(losses.ClipPMLoss(), (8, 24)), 3),
}


def module_call(name: str, dtype: torch.dtype = torch.float32) -> tuple[Callable, Callable]:
    """Returns tensors, and a function of them by the module: a block in `dtype`, a loss in
    float32.
    """
    tensors, make, count = MODULES[name]
    module = make()
    if name == "SimplifiedBlock":
        module.to(dtype)

    def function(*args: Tensor) -> Tensor:
        out = module(*args[:count])
        if isinstance(out, tuple):
            return sum(out)
        return out if out.dim() == 0 else _number(out)

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
    """Checks schemas, autograd, and the shapes, dtypes and strides that fake functions promise, of
    forward and backward.

    Backward runs on the backend that comes first, except after "sdpa", whose forward keeps tensors
    in a layout of its own.
    """
    make, function = SMALL[name]
    first_backend = ""
    if backend == "sdpa":
        first_backend = backend
    with forced(first_backend), Dispatched() as mode, torch.device(device):
        tensors = [
            t.detach().to(device).requires_grad_(t.requires_grad) for t in make(4, torch.float32)
        ]
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
