"""The calls whose cost is predicted, on fake tensors: ops at the sizes of CLIP's models."""

from __future__ import annotations

import functools
from collections.abc import Callable
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
WIDTH = 512
LENGTHS = (50, 77, 197)
BATCH, HEADS, HEAD = 64, 12, 64  # of attention
# Sequences, tokens, C, F and heads: the text tower of siclip-s0 (causal), SigLIP's So400m at 224
# pixels, ViT-B/16.
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


def _leaf(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda").requires_grad_(grad)


def _step(call: Callable[[], Tensor], backward: bool) -> None:
    if not backward:
        with torch.no_grad():
            call()
        return
    out = call()
    out.backward(torch.empty_like(out) if out.dim() else None)


def loss_function(
    terms: tuple[str, ...], n: int, width: int, dtype: torch.dtype, **options
) -> Callable[[], Tensor]:
    """Returns a function that computes the sum of a loss's terms."""
    tensors = {name: _leaf(n, width, dtype=dtype) for name in ("image", "text")}
    tensors["logit_scale"] = _leaf()
    if "pair_matching" in terms:
        tensors["plane"] = (_leaf(), _leaf())
    if "sigmoid" in terms:
        tensors["logit_bias"] = _leaf()
    if "relational" in terms:
        tensors |= {
            f"teacher_{name}": _leaf(n, width, dtype=dtype, grad=False)
            for name in ("image", "text")
        }
        tensors["teacher_scale"] = _leaf(grad=False)
    weights = dict.fromkeys(terms, 1.0) if len(terms) > 1 else None
    total = "loss" if weights else terms[0]
    return lambda: ops.similarity_loss(**tensors, terms=terms, weights=weights, **options)[total]


def loss(
    terms: tuple[str, ...], n: int, width: int, dtype: torch.dtype, backward: bool, **options
) -> None:
    _step(loss_function(terms, n, width, dtype, **options), backward)


def attention(shape: tuple[int, ...], causal: bool, dtype: torch.dtype, backward: bool) -> None:
    q, k, v = (_leaf(*shape, dtype=dtype) for _ in range(3))
    gains = [_leaf(shape[2]) for _ in range(3)]
    _step(lambda: ops.shaped_attention(q, k, v, *gains, causal=causal), backward)


def mlp(tower: tuple, dtype: torch.dtype, backward: bool) -> None:
    b, length, c, f, *_ = tower
    tensors = [
        _leaf(*shape, dtype=dtype) for shape in ((b * length, c), (f, c), (f,), (c, f), (c,))
    ]
    _step(lambda: ops.parallel_mlp(*tensors), backward)


def block(tower: tuple, dtype: torch.dtype, backward: bool) -> None:
    b, length, c, f, heads, causal = tower
    matrices = [
        _leaf(*shape, dtype=dtype)
        for shape in ((b, length, c), (2 * c, c), (f, c), (f,), (c, f), (c,))
    ]
    gains = {name: _leaf(heads) for name in ("alpha", "beta", "gamma")}
    norm = {name: _leaf(c) for name in ("norm_weight", "norm_bias")}
    scalars = {name: _leaf() for name in ("attention_gain", "mlp_gain")}
    tensors = gains | norm | scalars
    _step(lambda: ops.simplified_block(*matrices, **tensors, causal=causal), backward)


def losses(sizes: tuple[int, ...], width: int = WIDTH) -> list[Case]:
    return [
        Case(name, f"N={n} D={width}", functools.partial(loss, terms, n, width))
        for n in sizes
        for name, terms in LOSSES.items()
    ]


def others() -> list[Case]:
    """Returns calls of attention, MLPs and blocks."""
    made = []
    for length in LENGTHS:
        causal = length == 77
        text = f"B={BATCH} L={length} H={HEADS} K={HEAD}" + " causal" * causal
        run = functools.partial(attention, (BATCH, length, HEADS, HEAD), causal)
        made.append(Case(f"attention-{length}", text, run))
    for name, tower in TOWERS.items():
        b, length, c, f, heads, causal = tower
        made.append(
            Case(f"mlp-{name}", f"T={b * length} C={c} F={f}", functools.partial(mlp, tower))
        )
        text = f"B={b} L={length} C={c} F={f} H={heads}" + " causal" * causal
        made.append(Case(f"block-{name}", text, functools.partial(block, tower)))
    return made
