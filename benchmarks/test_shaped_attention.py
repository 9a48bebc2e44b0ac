"""shaped_attention against the formula, SDPA and FlexAttention with the other two terms, plain and compiled.

    pytest benchmarks/test_shaped_attention.py --repeats 9 --write

Forms take turns within a round; the figure is the median of the rounds. Every form's result is compared with the formula's
in float64 before it is timed. "SDPA alone" computes one of the three terms.
"""

import pytest
import torch

from benchmarks.attention_forms import ALONE, SHAPES, forms, inputs, plain
from benchmarks.measure import interleaved_times, quantiles


def step(form, tensors, grad, shape, backward):
    if not backward:
        with torch.no_grad():
            return form(*tensors, shape.causal)
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = form(*leaves, shape.causal)
    out.backward(grad)
    return out.detach()


def measure(shape, dtype, backward, repeats, device="cpu"):
    torch.compiler.reset()
    tensors, grad = inputs(shape, getattr(torch, dtype), device)
    found = forms(device, backward)
    truth = plain(*(t[:2].double() if t.dim() == 4 else t.double() for t in tensors), causal=shape.causal)
    for name, form in found.items():
        error = (step(form, tensors, grad, shape, backward)[:2].double() - truth).abs().max() / truth.abs().max()
        limit = 5e-4 if dtype == "float32" else 3e-2
        assert name == ALONE or error <= limit, f"{name}: error {error:.1e}"
    cases = {name: lambda form=form: step(form, tensors, grad, shape, backward) for name, form in found.items()}
    times = interleaved_times(cases, repeats, warmup=2)
    base = quantiles(times["simplclip"])[1]
    return [
        {
            "op": "shaped_attention",
            "shape": str(shape),
            "dtype": dtype,
            "pass": "forward + backward" if backward else "forward",
            "form": name,
            "repeats": repeats,
            **{f"p{p}_ms": round(1e3 * s, 2) for p, s in zip((20, 50, 80), quantiles(times[name]))},
            "times_ours": round(quantiles(times[name])[1] / base, 2),
        }
        for name in found
    ]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shaped_attention(benchmark, rows, request, shape, dtype, backward):
    args = (shape, dtype, backward, request.config.getoption("--repeats"))
    rows += benchmark.pedantic(measure, args=args, rounds=1)
