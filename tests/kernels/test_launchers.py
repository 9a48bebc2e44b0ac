"""Memory of Triton's launchers on fake tensors, which run without their kernels; on a GPU beside what they take there."""

import itertools

import pytest
import torch
from calls import Call, attention_call, function_of, mlp_call, outputs_of, similarity_call
from devices import DTYPES
from interpreter import needs_triton
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from simplclip.memory import pretend
from simplclip.memory.count import WORKSPACE, Counter
from simplclip.memory.engine import Engine
from simplclip.ops.similarity.call import TERMS

CUDA = torch.device("cuda", 0)
OBJECTIVES = {
    "contrastive": {"terms": TERMS[:1]},
    "hard": {"terms": TERMS[:2], "negatives": "hard"},
    "hadamard": {"terms": TERMS[:2], "plane": "hadamard"},
    "all": {"terms": TERMS, "interactive": "kl", "teacher_width": 96},
    "infonce": {"terms": TERMS[3:]},
}


def similarity(name: str, scratch_bytes: int) -> Call:
    """A call that runs in chunks of at most `scratch_bytes`."""
    return similarity_call(3000, 3100, 20, ids=True, width=64, **OBJECTIVES[name], scratch_bytes=scratch_bytes)


def others() -> list[Call]:
    return [
        Call("feature_loss", {"student": torch.randn(900, 48), "teacher": torch.randn(900, 48)}),
        attention_call(8, 257, 2, 32, causal=True),
        mlp_call(3000, 64, 256, 64),
    ]


def run(call: Call, tensors: dict) -> None:
    sum(out.sum() for out in outputs_of(function_of(call), call, tensors).values()).backward()


def predicted(call: Call, dtype: torch.dtype) -> Counter:
    counter, mode = Counter(CUDA), FakeTensorMode(allow_fallback_kernels=False)
    fakes = tree_map_only(torch.Tensor, pretend.Fakes(mode, CUDA).of, call.typed(dtype))
    counter.hold(list(fakes.values()), "batch")
    for name in call.needed():
        fakes[name].requires_grad_()
    with pretend.fake_step(mode, CUDA), Engine(lambda gradient: None).installed(), counter.counting():
        run(call, fakes)
    return counter


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_chunks_between_the_second_and_the_last_change_no_peak(name, dtype, monkeypatch):
    """Which is why predictions leave them out."""
    from simplclip.kernels import launch
    from simplclip.kernels.similarity import op, rows

    some = predicted(similarity(name, 1 << 15), dtype)
    for module in (op, rows):
        monkeypatch.setattr(module, "starts", lambda size, step: range(0, size, step))
    whole = predicted(similarity(name, 1 << 15), dtype)
    assert some.usage.peak == whole.usage.peak
    if name == "all":  # others add in place, without an event
        assert len(some.usage.events) < len(whole.usage.events)
    assert not launch._pretends


@needs_triton
def test_a_smaller_budget_of_scratch_is_less_memory():
    large, small = (predicted(similarity("all", size), torch.bfloat16).usage for size in (1 << 22, 1 << 17))
    assert small.peak < large.peak
    assert any(kind == WORKSPACE for kind, _ in small.events)


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_prediction_on_a_gpu(dtype):
    calls = [similarity(name, size) for name, size in itertools.product(OBJECTIVES, (1 << 17, 1 << 22))]
    for call in [*calls, *others()]:
        expected = predicted(call, dtype).usage.peak
        args = {name: value.to(CUDA).requires_grad_(name in call.needed()) for name, value in call.typed(dtype).items()}
        run(call, args)  # compiles, and libraries allocate what they keep
        for value in args.values():
            value.grad = None
        before = torch.cuda.memory_allocated() - sum(-(-v.nbytes // 512) * 512 for v in args.values())
        torch.cuda.reset_peak_memory_stats()
        run(call, args)
        torch.cuda.synchronize()
        measured = torch.cuda.max_memory_allocated() - before
        assert abs(measured - expected) <= max(1 << 18, measured // 100)  # reductions have some scratch of their own
