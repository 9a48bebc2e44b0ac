"""Memory of Triton's launchers on fake tensors, which run without their kernels; on a GPU beside what they take there."""

import itertools

import pytest
import torch
from interpreter import needs_triton
from similarity import make_inputs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from simplclip.memory import pretend
from simplclip.memory.count import WORKSPACE, Counter
from simplclip.memory.engine import Engine
from simplclip.ops import feature_loss, parallel_mlp, shaped_attention, similarity_loss
from simplclip.ops.similarity.call import TERMS

CUDA = torch.device("cuda", 0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OBJECTIVES = {
    "contrastive": {"terms": TERMS[:1]},
    "hard": {"terms": TERMS[:2], "negatives": "hard"},
    "hadamard": {"terms": TERMS[:2], "plane": "hadamard"},
    "all": {"terms": TERMS, "interactive": "kl", "teacher_width": 96},
    "infonce": {"terms": TERMS[3:]},
}


def similarity_call(name: str, dtype: torch.dtype, scratch_bytes: int):
    """Leaves, and a function of them that runs forward and backward in chunks of at most `scratch_bytes`."""
    case = dict(OBJECTIVES[name])
    build = {key: case.pop(key) for key in ("terms", "plane", "teacher_width") if key in case}
    leaves, options = make_inputs(3000, 3100, 20, ids=True, width=64, **build)
    leaves |= {key: options.pop(key) for key in ("ids", "text_ids")}
    wide = {"logit_scale", "interactive_scale", "teacher_scale", "plane_weight", "plane_bias"}
    for key, value in leaves.items():
        if value.is_floating_point():
            leaves[key] = value.to(torch.float32 if key in wide else dtype)

    def run(**args):
        if "plane_weight" in args:
            args["plane"] = args.pop("plane_weight"), args.pop("plane_bias")
        sum(similarity_loss(**args, **options, **case, scratch_bytes=scratch_bytes).values()).backward()

    return run, leaves, {key for key in leaves if "teacher" not in key and "ids" not in key}


def other_calls(dtype: torch.dtype):
    """The same of the other ops."""
    n = lambda *shape: torch.randn(shape).to(dtype)  # noqa: E731
    yield lambda x, y: feature_loss(x, y).backward(), {"x": n(900, 48), "y": n(900, 48)}, {"x"}
    q = {key: n(8, 257, 2, 32) for key in "qkv"} | {key: torch.ones(2) for key in ("alpha", "beta", "gamma")}
    yield lambda **a: shaped_attention(**a, causal=True).sum().backward(), q, set(q)
    mlp = {"x": n(3000, 64), "fc1_weight": n(256, 64), "fc1_bias": n(256), "fc2_weight": n(64, 256), "fc2_bias": n(64)}
    yield lambda **a: parallel_mlp(**a).sum().backward(), mlp, set(mlp)


def predicted(run, leaves, wanted) -> Counter:
    counter, mode = Counter(CUDA), FakeTensorMode(allow_fallback_kernels=False)
    fakes = tree_map_only(torch.Tensor, pretend.Fakes(mode, CUDA).of, leaves)
    counter.hold(list(fakes.values()), "batch")
    for name in wanted:
        fakes[name].requires_grad_()
    with pretend.fake_step(mode, CUDA), Engine(lambda gradient: None).installed(), counter.counting():
        run(**fakes)
    return counter


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_chunks_between_the_second_and_the_last_change_no_peak(name, dtype, monkeypatch):
    """Which is why predictions leave them out."""
    from simplclip.kernels import launch
    from simplclip.kernels.similarity import op, rows

    some = predicted(*similarity_call(name, dtype, 1 << 15))
    for module in (op, rows):
        monkeypatch.setattr(module, "starts", lambda size, step: range(0, size, step))
    whole = predicted(*similarity_call(name, dtype, 1 << 15))
    assert some.usage.peak == whole.usage.peak
    if name == "all":  # others add in place, without an event
        assert len(some.usage.events) < len(whole.usage.events)
    assert not launch._pretends


@needs_triton
def test_a_smaller_budget_of_scratch_is_less_memory():
    large, small = (predicted(*similarity_call("all", torch.bfloat16, size)).usage for size in (1 << 22, 1 << 17))
    assert small.peak < large.peak
    assert any(kind == WORKSPACE for kind, _ in small.events)


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_prediction_on_a_gpu(dtype):
    calls = [similarity_call(name, dtype, size) for name, size in itertools.product(OBJECTIVES, (1 << 17, 1 << 22))]
    for run, leaves, wanted in [*calls, *other_calls(dtype)]:
        expected = predicted(run, leaves, wanted).usage.peak
        args = {name: value.to(CUDA).requires_grad_(name in wanted) for name, value in leaves.items()}
        run(**args)  # compiles, and libraries allocate what they keep
        for value in args.values():
            value.grad = None
        before = torch.cuda.memory_allocated() - sum(-(-v.nbytes // 512) * 512 for v in args.values())
        torch.cuda.reset_peak_memory_stats()
        run(**args)
        torch.cuda.synchronize()
        measured = torch.cuda.max_memory_allocated() - before
        assert abs(measured - expected) <= max(1 << 18, measured // 100)  # reductions have some scratch of their own
