"""A simplified block against open_clip's block and its own formula, plain and compiled: time, and memory kept for backward.

    pytest benchmarks/test_simplified_block.py --repeats 9 --write

A block of CLIP's text tower (C=512, 8 heads, 77 tokens, causal), 64 sequences. Forms take turns within a round.
"""

import pytest
import torch

from benchmarks.block_forms import forms, saved_bytes
from benchmarks.measure import interleaved_times, quantiles

WIDTH, HEADS, LENGTH, BATCH = 512, 8, 77, 64
BASE = "open_clip's block"


def step(form, x, grad, backward):
    if not backward:
        with torch.no_grad():
            return form(x)
    leaf = x.detach().requires_grad_()
    form(leaf).backward(grad)
    return leaf.grad


def measure(dtype, backward, repeats, device="cpu", width=WIDTH, heads=HEADS, length=LENGTH, batch=BATCH):
    torch.compiler.reset()
    found = forms(width, heads, length, getattr(torch, dtype), device)
    x, grad = (torch.randn(batch, length, width).to(device, getattr(torch, dtype)) for _ in range(2))
    results = {name: step(form, x, grad, backward).float() for name, form in found.items()}
    for name in list(found)[1:4]:
        error = (results[name] - results["simplclip"]).abs().max() / results["simplclip"].abs().max()
        assert error <= (1e-4 if dtype == "float32" else 5e-2), f"{name}: {error:.1e}"
    saved = {name: saved_bytes(form, x) for name, form in found.items() if "compile" not in name}
    cases = {name: lambda form=form: step(form, x, grad, backward) for name, form in found.items()}
    times = interleaved_times(cases, repeats, warmup=2)
    base = quantiles(times["simplclip"])[1]
    return [
        {
            "op": "simplified_block",
            "shape": f"B={batch} L={length} C={width} causal",
            "dtype": dtype,
            "pass": "forward + backward" if backward else "forward",
            "form": name,
            "repeats": repeats,
            **{f"p{p}_ms": round(1e3 * s, 2) for p, s in zip((20, 50, 80), quantiles(times[name]))},
            "times_ours": round(quantiles(times[name])[1] / base, 2),
            "saved_bytes_per_token": round(saved[name] / (batch * length)) if name in saved and backward else "",
            "of_open_clips": round(saved[name] / saved[BASE], 3) if name in saved and backward else "",
        }
        for name in found
    ]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_simplified_block(benchmark, rows, request, dtype, backward):
    args = (dtype, backward, request.config.getoption("--repeats"))
    rows += benchmark.pedantic(measure, args=args, rounds=1)
