"""Memory of Triton's launchers, predicted on fake tensors; on a GPU also measured."""

import pytest
import torch

from simplclip.plan.count import WORKSPACE, Counter
from support.devices import DTYPES, cuda_peak_bytes, needs_triton
from support.ops.predicted_calls import (
    attention_call,
    forward_and_backward,
    mlp_call,
    predicted,
    similarity_call,
)

CUDA = torch.device("cuda", 0)
OBJECTIVES = ("contrastive", "pair matching", "hadamard", "every term")


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("hadamard", torch.float32), ("every term", torch.float16)],
)
def test_chunks_between_the_second_and_the_last_change_no_peak(name, dtype, monkeypatch):
    """Predictions can therefore leave these chunks out."""
    call = similarity_call(name, 500, 600, scratch_bytes=1 << 15)
    few = predicted(call, dtype, CUDA).usage
    monkeypatch.setattr(Counter, "_few_first_rows", lambda _, size, step: range(0, size, step))
    whole = predicted(call, dtype, CUDA).usage
    assert few.peak == whole.peak
    assert any(kind == WORKSPACE for kind, _ in few.events)
    if name == "every term":  # others add in place, without an event
        assert len(few.events) < len(whole.events)


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_prediction_on_a_gpu(dtype):
    calls = [
        similarity_call(name, scratch_bytes=size)
        for name in OBJECTIVES
        for size in (1 << 17, 1 << 22)
    ]
    for call in [*calls, attention_call(8, 257, 2, 32), mlp_call(3000, 64, 256)]:
        expected = predicted(call, dtype, CUDA).usage.peak
        args = {name: t.to(CUDA) for name, t in call.typed(dtype).items()}
        forward_and_backward(call, args)  # compiles, and lets libraries allocate what they keep
        for value in args.values():
            value.grad = None
        held = sum(-(-v.nbytes // 512) * 512 for v in args.values())
        measured = held + cuda_peak_bytes(
            lambda call=call, args=args: forward_and_backward(call, args)
        )
        # reductions use some scratch of their own
        assert abs(measured - expected) <= max(1 << 18, measured // 100)
