"""A simplified block against open_clip's residual block of the same width: time, and bytes saved for backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn

from benchmarks.attention_forms import plain
from benchmarks.measure import PASSES, attempted, interleaved_times, row_of
from simplclip.nn import SimplifiedBlock
from simplclip.ops.mlp.reference import ACTIVATIONS

WIDTH, HEADS, LENGTH, BATCH = 512, 8, 77, 64
BASE = "open_clip's block"


class PlainBlock(nn.Module):
    """A module that computes a SimplifiedBlock from its parameters in plain torch ops."""

    def __init__(self, block: SimplifiedBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        block = self.block
        n = block.norm(x)
        heads = [t.reshape(*x.shape[:2], block.heads, -1) for t in (*F.linear(n, block.qk.weight).chunk(2, -1), n)]
        attention = plain(*heads, block.alpha, block.beta, block.gamma, causal=block.causal).reshape(x.shape)
        mlp = block.fc2(ACTIVATIONS[block.act](block.fc1(n)))
        return block.attention_gain * attention + block.mlp_gain * mlp


def forms(
    width: int, heads: int, length: int, dtype: torch.dtype, device: str = "cpu"
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Returns causal blocks of a CLIP text tower; the simplified blocks have equal weights."""
    torch.manual_seed(0)
    ours = SimplifiedBlock(width, heads, causal=True)
    nn.init.normal_(ours.qk.weight, std=width**-0.5)
    again = SimplifiedBlock(width, heads, causal=True, recompute=True)
    again.load_state_dict(ours.state_dict())
    theirs = ResidualAttentionBlock(width, heads)
    ours, again, theirs = (module.to(device, dtype) for module in (ours, again, theirs))
    mask = torch.full((length, length), -torch.inf, dtype=dtype, device=device).triu(1)
    residual = lambda x: theirs(x, attn_mask=mask)  # noqa: E731
    formula = PlainBlock(ours)
    return {
        "simplclip": ours,
        "simplclip, recompute": again,
        "the same in plain torch": formula,
        "torch.compile of it": torch.compile(formula, dynamic=False),
        "open_clip's block": residual,
        "torch.compile of that": torch.compile(residual, dynamic=False),
    }


def saved_bytes(form: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes of the distinct storages that autograd keeps for backward, without those of parameters."""
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
    dtype, backward, repeats, device="cpu", width=WIDTH, heads=HEADS, length=LENGTH, batch=BATCH, strict=True
):  # fmt: skip
    torch.compiler.reset()
    found = forms(width, heads, length, getattr(torch, dtype), device)
    x, grad = (torch.randn(batch, length, width).to(device, getattr(torch, dtype)) for _ in range(2))
    same, limit = list(found)[:4], 1e-4 if dtype == "float32" else 5e-2

    def wrong(name, result, ours) -> str:
        error = ((result - ours).abs().max() / ours.abs().max()).item()
        return "" if name not in same or error <= limit else f"{name}: {error:.1e}"

    first = {name: lambda form=form: _step(form, x, grad, backward).float() for name, form in found.items()}
    results, reasons = attempted(first, wrong, strict=strict)
    saved = {name: saved_bytes(found[name], x) for name in results if "compile" not in name and backward}
    cases = {name: lambda form=found[name]: _step(form, x, grad, backward) for name in results}
    times = interleaved_times(cases, repeats, warmup=2, strict=strict)
    reasons |= times.failed
    shape = f"B={batch} L={length} C={width} causal"
    what = {"op": "simplified_block", "shape": shape, "dtype": dtype, "pass": PASSES[backward]}
    rows = []
    for name in found:
        row = row_of(what | {"form": name, "repeats": repeats}, times, name, reasons, strict)
        known = name in saved and BASE in saved
        row["saved_bytes_per_token"] = round(saved[name] / (batch * length)) if name in saved else ""
        rows.append(row | {"of_open_clips": round(saved[name] / saved[BASE], 3) if known else ""})
    return rows
