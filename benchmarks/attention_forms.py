"""Shaped attention as users write it today, beside ours, and the inputs to time both with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import BASE, PASSES, compare
from simplclip.ops import shaped_attention


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    gamma: Tensor,
    causal: bool = False,
) -> Tensor:
    """Computes the formula with softmax and mixing weights in float32 and one product with v."""
    length = q.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    logits = (q @ k.transpose(-2, -1)).to(wide) * q.shape[-1] ** -0.5
    visible = torch.ones(length, length, dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril()
        logits = logits.masked_fill(~visible, -torch.inf)
    uniform = visible.to(wide) / visible.sum(-1, keepdim=True)
    identity = torch.eye(length, dtype=wide, device=q.device)
    alpha, beta, gamma = (t.to(wide)[:, None, None] for t in (alpha, beta, gamma))
    mixed = alpha * identity + beta * logits.softmax(-1) - gamma * uniform
    return (mixed.to(v.dtype) @ v).transpose(1, 2)


def _linear_terms(v: Tensor, alpha: Tensor, gamma: Tensor, causal: bool) -> Tensor:
    """Returns alpha v − gamma C v."""
    if causal:
        counts = torch.arange(1, v.shape[1] + 1, dtype=v.dtype, device=v.device)
        mean = v.cumsum(1) / counts[:, None, None]
    else:
        mean = v.mean(1, keepdim=True)
    return alpha.to(v.dtype)[:, None] * v - gamma.to(v.dtype)[:, None] * mean


# The forms share one signature: q, k, v, alpha, beta, gamma, causal.
def _sdpa(q, k, v, alpha, beta, gamma, causal):
    heads = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*heads, is_causal=causal).transpose(1, 2)


def _sdpa_and_terms(q, k, v, alpha, beta, gamma, causal):
    attended = beta.to(v.dtype)[:, None] * _sdpa(q, k, v, alpha, beta, gamma, causal)
    return attended + _linear_terms(v, alpha, gamma, causal)


def _ours(q, k, v, alpha, beta, gamma, causal):
    return shaped_attention(q, k, v, alpha, beta, gamma, causal=causal)


@dataclass(frozen=True)
class Shape:
    """A case: B sequences of L tokens, H heads of K."""

    b: int
    length: int
    heads: int
    k: int
    causal: bool = False

    def __str__(self) -> str:
        text = f"B={self.b} L={self.length} H={self.heads} K={self.k}"
        return f"{text} causal" if self.causal else text


# CLIP text towers (77 tokens), MobileCLIP's last image stage (64), ViT-B/16 (197).
SHAPES = (
    Shape(256, 77, 8, 64, True),
    Shape(64, 77, 8, 64),
    Shape(64, 64, 16, 32),
    Shape(32, 197, 12, 64),
)
# Leaves out two of the three terms of shaped attention, which all other forms compute.
ALONE = "SDPA alone"


def forms() -> dict[str, Callable]:
    return {
        BASE: _ours,
        "formula": plain,
        "torch.compile of it": torch.compile(plain, dynamic=False),
        "SDPA and linear terms": _sdpa_and_terms,
        "torch.compile of that": torch.compile(_sdpa_and_terms, dynamic=False),
        ALONE: _sdpa,
    }


def inputs(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> tuple[list[Tensor], Tensor]:
    """Returns q, k (views of one product), v and the gains; and a gradient of the result."""
    g = torch.Generator().manual_seed(0)
    b, length, h, k = shape.b, shape.length, shape.heads, shape.k
    qk = torch.randn(b, length, 2, h, k, generator=g).to(device, dtype)
    v, grad = (torch.randn(b, length, h, k, generator=g).to(device, dtype) for _ in range(2))
    gains = [torch.rand(h, generator=g).to(device) + 0.5 for _ in range(3)]
    return [qk[:, :, 0], qk[:, :, 1], v, *gains], grad


def _step(
    form: Callable, tensors: list[Tensor], grad: Tensor, causal: bool, backward: bool
) -> Tensor:
    if not backward:
        with torch.no_grad():
            return form(*tensors, causal)
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = form(*leaves, causal)
    out.backward(grad)
    return out.detach()


def measure(
    shape: Shape, dtype: str, backward: bool, device: str, repeats: int, strict: bool = True
) -> list[dict]:
    """Returns a row for each form, first compared in float64. strict: as for `compare`."""
    torch.compiler.reset()
    tensors, grad = inputs(shape, getattr(torch, dtype), device)
    few = [t[:2] if t.dim() == 4 else t for t in tensors]  # two sequences
    exact = plain(*(t.double() for t in few), causal=shape.causal)
    limit = 5e-4 if dtype == "float32" else 3e-2
    cases = {
        name: lambda form=form: _step(form, tensors, grad, shape.causal, backward)
        for name, form in forms().items()
    }

    def error(run: Callable[[], Tensor]) -> float:
        return ((run()[:2].double() - exact).abs().max() / exact.abs().max()).item()

    def wrong(name: str, error: float, ours: float) -> str:
        if name == ALONE or error <= limit:
            return ""
        return f"{name}: error {error:.1e}"

    first = {name: lambda run=run: error(run) for name, run in cases.items()}
    what = {"op": "shaped_attention", "shape": str(shape), "dtype": dtype, "pass": PASSES[backward]}
    return compare(what, cases, repeats, first=first, wrong=wrong, warmup=2, strict=strict)
