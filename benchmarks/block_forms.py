"""A simplified block against open_clip's residual block of the same width: time, and bytes saved
for backward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn

from benchmarks.attention_forms import plain
from benchmarks.measure import BASE, PASSES, compare
from simplclip.nn import SimplifiedBlock
from simplclip.ops.mlp.reference import ACTIVATIONS

WIDTH = 512
HEADS = 8
LENGTH = 77
BATCH = 64
STANDARD = "open_clip's block"


class PlainBlock(nn.Module):
    """A module that computes a SimplifiedBlock from its parameters in plain torch ops."""

    def __init__(self, block: SimplifiedBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        block = self.block
        n = block.norm(x)
        heads = [
            t.reshape(*x.shape[:2], block.heads, -1)
            for t in (*F.linear(n, block.qk.weight).chunk(2, -1), n)
        ]
        attention = plain(
            *heads, block.alpha, block.beta, block.gamma, causal=block.causal
        ).reshape(x.shape)
        mlp = block.fc2(ACTIVATIONS[block.act](block.fc1(n)))
        return block.attention_gain * attention + block.mlp_gain * mlp


def forms(dtype: torch.dtype, device: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """Returns causal blocks of a CLIP text tower; the simplified blocks have equal weights."""
    torch.manual_seed(0)
    ours = SimplifiedBlock(WIDTH, HEADS, causal=True)
    nn.init.normal_(ours.qk.weight, std=WIDTH**-0.5)
    again = SimplifiedBlock(WIDTH, HEADS, causal=True, recompute=True)
    again.load_state_dict(ours.state_dict())
    standard = ResidualAttentionBlock(WIDTH, HEADS)
    ours, again, standard = (module.to(device, dtype) for module in (ours, again, standard))
    mask = torch.full((LENGTH, LENGTH), -torch.inf, dtype=dtype, device=device).triu(1)
    residual = lambda x: standard(x, attn_mask=mask)  # noqa: E731
    formula = PlainBlock(ours)
    return {
        BASE: ours,
        f"{BASE}, recompute": again,
        "the same in plain torch": formula,
        "torch.compile of it": torch.compile(formula, dynamic=False),
        STANDARD: residual,
        "torch.compile of that": torch.compile(residual, dynamic=False),
    }


def saved_bytes(form: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes of the distinct storages that autograd keeps for backward, without those of
    parameters.
    """
    held: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter):
            storage = t.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
        return t

    weights = set()
    for part in _modules(form):
        weights |= {p.untyped_storage().data_ptr() for p in part.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = form(x.detach().requires_grad_())
    del out
    return sum(size for at, size in held.items() if at not in weights)


def _modules(form) -> list[nn.Module]:
    cells = [cell.cell_contents for cell in getattr(form, "__closure__", None) or ()]
    return [m for m in (form, *cells) if isinstance(m, nn.Module)]


def _step(form, x, grad, backward):
    if not backward:
        with torch.no_grad():
            return form(x)
    leaf = x.detach().requires_grad_()
    form(leaf).backward(grad)
    return leaf.grad


def measure(
    dtype: str, backward: bool, batch: int, device: str, repeats: int, strict: bool = True
) -> list[dict]:
    """Returns a row for each form.

    Compares the simplified blocks' results first. strict: as for `compare`.
    """
    torch.compiler.reset()
    kind = getattr(torch, dtype)
    of_name = forms(kind, device)
    x, grad = (torch.randn(batch, LENGTH, WIDTH).to(device, kind) for _ in range(2))
    cases = {
        name: lambda form=form: _step(form, x, grad, backward) for name, form in of_name.items()
    }
    simplified, limit = list(of_name)[:4], 1e-4 if dtype == "float32" else 5e-2

    def wrong(name: str, result: Tensor, ours: Tensor) -> str:
        error = ((result.float() - ours.float()).abs().max() / ours.float().abs().max()).item()
        return "" if name not in simplified or error <= limit else f"{name}: error {error:.1e}"

    shape = f"B={batch} L={LENGTH} C={WIDTH} causal"
    what = {"op": "simplified_block", "shape": shape, "dtype": dtype, "pass": PASSES[backward]}
    rows = compare(what, cases, repeats, wrong=wrong, warmup=2, strict=strict)
    eager = [row for row in rows if backward and "p50_ms" in row and "compile" not in row["form"]]
    saved = {row["form"]: saved_bytes(of_name[row["form"]], x) for row in eager}
    for row in eager:
        row["saved_bytes_per_token"] = round(saved[row["form"]] / (batch * LENGTH))
    return rows
