"""The calls whose cost is predicted: losses, attention, MLP and block at the sizes of CLIP's models, on fake tensors."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from simplclip import ops

LOSSES = {
    "contrastive": ("contrastive",),
    "contrastive+pair_matching": ("contrastive", "pair_matching"),
    "sigmoid": ("sigmoid",),
    "all": ("contrastive", "pair_matching", "relational"),
}
SIZES = (4096, 32768, 65536)
WIDTH = 512
LENGTHS = (50, 64, 77, 197, 257)
BATCH, HEADS, HEAD = 64, 12, 64  # of attention
# Sequences, tokens, C, F and heads: the text tower of siclip-s0 (causal), SigLIP's So400m at 224 pixels, ViT-B/16.
TOWERS = {
    "siclip": (64, 77, 512, 2048, 8, True),
    "siglip": (16, 256, 1152, 4304, 16, False),
    "vit-b": (32, 197, 768, 3072, 12, False),
}


@dataclass(frozen=True)
class Case:
    """A call whose cost is predicted."""

    name: str
    shape: str
    run: Callable[[torch.dtype, bool], None]  # dtype, and whether to run backward
    product: tuple[int, int, int]  # m n k of its largest product

    def __str__(self) -> str:
        return f"{self.name}, {self.shape}"


make, device = torch.empty, "cuda"  # make the tensors of a call; `real` replaces both


def _normalised(shape: tuple[int, ...], **options) -> Tensor:
    return torch.randn(shape, **options) / math.sqrt(shape[-1] if shape else 1)


@contextlib.contextmanager
def real(on: str) -> Iterator[None]:
    """Context in which calls run on tensors with values, whose rows have about the length of normalised features."""
    global make, device
    before = make, device
    make, device = _normalised, on
    try:
        yield
    finally:
        make, device = before


def _leaf(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    return make(shape, dtype=dtype, device=device).requires_grad_(grad)


def _step(make: Callable[[], Tensor], backward: bool) -> None:
    if not backward:
        with torch.no_grad():
            make()
        return
    out = make()
    out.backward(torch.empty_like(out) if out.dim() else None)


def loss(terms: tuple[str, ...], n: int, width: int, dtype: torch.dtype, backward: bool, **options) -> None:
    tensors = {"image": _leaf(n, width, dtype=dtype), "text": _leaf(n, width, dtype=dtype), "logit_scale": _leaf()}
    if "pair_matching" in terms:
        tensors["plane"] = (_leaf(), _leaf())
    if "sigmoid" in terms:
        tensors["logit_bias"] = _leaf()
    if "relational" in terms:
        tensors |= {f"teacher_{name}": _leaf(n, width, dtype=dtype, grad=False) for name in ("image", "text")}
        tensors["teacher_scale"] = _leaf(grad=False)
    weights = dict.fromkeys(terms, 1.0) if len(terms) > 1 else None
    total = "loss" if weights else terms[0]
    _step(lambda: ops.similarity_loss(**tensors, terms=terms, weights=weights, **options)[total], backward)


def attention(shape: tuple[int, ...], causal: bool, dtype: torch.dtype, backward: bool) -> None:
    q, k, v = (_leaf(*shape, dtype=dtype) for _ in range(3))
    gains = [_leaf(shape[2]) for _ in range(3)]
    _step(lambda: ops.shaped_attention(q, k, v, *gains, causal=causal), backward)


def mlp(tower: tuple, dtype: torch.dtype, backward: bool) -> None:
    b, length, c, f, *_ = tower
    tensors = [_leaf(*shape, dtype=dtype) for shape in ((b * length, c), (f, c), (f,), (c, f), (c,))]
    _step(lambda: ops.parallel_mlp(*tensors), backward)


def block(tower: tuple, dtype: torch.dtype, backward: bool) -> None:
    b, length, c, f, heads, causal = tower
    matrices = [_leaf(*shape, dtype=dtype) for shape in ((b, length, c), (2 * c, c), (f, c), (f,), (c, f), (c,))]
    gains = {name: _leaf(heads) for name in ("alpha", "beta", "gamma")}
    rest = {"norm_weight": _leaf(c), "norm_bias": _leaf(c), "attention_gain": _leaf(), "mlp_gain": _leaf()}
    _step(lambda: ops.simplified_block(*matrices, **gains, **rest, causal=causal), backward)


def losses(sizes: tuple[int, ...] = SIZES, width: int = WIDTH) -> list[Case]:
    found = []
    for n in sizes:
        for name, terms in LOSSES.items():
            run = functools.partial(loss, terms, n, width)
            found.append(Case(name, f"N={n} D={width}", run, (n, n, width)))
    return found


def others(share: float = 1.0) -> list[Case]:
    """Returns calls of attention, MLPs and blocks. share: the part of their sequences to use."""
    found = []
    batch = max(1, int(BATCH * share))
    for length in LENGTHS:
        shape, causal = (batch, length, HEADS, HEAD), length == 77
        text = f"B={batch} L={length} H={HEADS} K={HEAD}" + " causal" * causal
        run = functools.partial(attention, shape, causal)
        found.append(Case(f"attention-{length}", text, run, (length, length, HEAD)))
    for name, (b, length, c, f, heads, causal) in TOWERS.items():
        b = max(1, int(b * share))
        tower, product = (b, length, c, f, heads, causal), (b * length, f, c)
        found.append(Case(f"mlp-{name}", f"T={b * length} C={c} F={f}", functools.partial(mlp, tower), product))
        text = f"B={b} L={length} C={c} F={f} H={heads}" + " causal" * causal
        found.append(Case(f"block-{name}", text, functools.partial(block, tower), product))
    return found
