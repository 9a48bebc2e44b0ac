"""A simplified block against open_clip's of the same width: time, bytes saved for backward."""

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
        q, k = F.linear(n, block.qk.weight).chunk(2, -1)
        heads = [t.reshape(*x.shape[:2], block.heads, -1) for t in (q, k, n)]
        gains = block.alpha, block.beta, block.gamma
        attention = plain(*heads, *gains, causal=block.causal).reshape(x.shape)
        mlp = block.fc2(ACTIVATIONS[block.act](block.fc1(n)))
        return block.attention_gain * attention + block.mlp_gain * mlp


def forms(dtype: torch.dtype, device: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """Returns causal blocks of a CLIP text tower; the simplified blocks have equal weights."""
    torch.manual_seed(0)
    ours = SimplifiedBlock(WIDTH, HEADS, causal=True)
    nn.init.normal_(ours.qk.weight, std=WIDTH**-0.5)
    recomputing = SimplifiedBlock(WIDTH, HEADS, causal=True, recompute=True)
    recomputing.load_state_dict(ours.state_dict())
    standard = ResidualAttentionBlock(WIDTH, HEADS)
    for module in (ours, recomputing, standard):
        module.to(device, dtype)
    mask = torch.full((LENGTH, LENGTH), -torch.inf, dtype=dtype, device=device).triu(1)
    residual = lambda x: standard(x, attn_mask=mask)  # noqa: E731
    formula = PlainBlock(ours)
    return {
        BASE: ours,
        f"{BASE}, recompute": recomputing,
        "the same in plain torch": formula,
        "torch.compile of it": torch.compile(formula, dynamic=False),
        STANDARD: residual,
        "torch.compile of that": torch.compile(residual, dynamic=False),
    }


def saved_bytes(form: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Returns the bytes of the storages that autograd keeps for backward, but for parameters."""
    kept_bytes: dict[int, int] = {}  # by address

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter):
            storage = t.untyped_storage()
            kept_bytes[storage.data_ptr()] = storage.nbytes()
        return t

    weights = set()
    for part in _modules(form):
        weights |= {p.untyped_storage().data_ptr() for p in part.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = form(x.detach().requires_grad_())
    del out
    return sum(size for address, size in kept_bytes.items() if address not in weights)


def _modules(form: Callable[[Tensor], Tensor]) -> list[nn.Module]:
    """Returns a form that is a module, or the modules that a function closes over."""
    cells = [cell.cell_contents for cell in getattr(form, "__closure__", None) or ()]
    return [m for m in (form, *cells) if isinstance(m, nn.Module)]


def _step(form: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor, backward: bool) -> Tensor:
    if not backward:
        with torch.no_grad():
            return form(x)
    leaf = x.detach().requires_grad_()
    form(leaf).backward(grad)
    return leaf.grad


def measure(
    dtype: str, backward: bool, batch: int, device: str, repeats: int, strict: bool = True
) -> list[dict]:
    """Returns a row for each form, whose results are compared first. strict: as for `compare`."""
    torch.compiler.reset()
    torch_dtype = getattr(torch, dtype)
    by_name = forms(torch_dtype, device)
    x, grad = (torch.randn(batch, LENGTH, WIDTH).to(device, torch_dtype) for _ in range(2))
    cases = {
        name: lambda form=form: _step(form, x, grad, backward) for name, form in by_name.items()
    }
    simplified = list(by_name)[:4]
    limit = 1e-4 if dtype == "float32" else 5e-2

    def wrong(name: str, result: Tensor, ours: Tensor) -> str:
        error = ((result.float() - ours.float()).abs().max() / ours.float().abs().max()).item()
        if name not in simplified or error <= limit:
            return ""
        return f"{name}: error {error:.1e}"

    shape = f"B={batch} L={LENGTH} C={WIDTH} causal"
    what = {"op": "simplified_block", "shape": shape, "dtype": dtype, "pass": PASSES[backward]}
    rows = compare(what, cases, repeats, wrong=wrong, warmup=2, strict=strict)
    for row in rows:
        if backward and "p50_ms" in row and "compile" not in row["form"]:
            saved = saved_bytes(by_name[row["form"]], x)
            row["saved_bytes_per_token"] = round(saved / (batch * LENGTH))
    return rows
