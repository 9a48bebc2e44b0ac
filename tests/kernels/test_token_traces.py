"""Attention, MLP and block on fake CUDA tensors: kernels that they start, and no wait for the
host; what the block keeps.
"""

import math

import pytest
import torch

import simplclip
from simplclip.ops import backends
from simplclip.selftest.calls import Call, attention_call, block_call, mlp_call, of_lengths
from simplclip.selftest.compare import outputs_of
from support.devices import needs_cpu_kernels, needs_triton
from support.kernels.recorder import names, trace
from support.ops.compare import function_of

OF_THE_TEST = 3  # kernels of the test: the sum of the results, and its gradient


def attention(*shape, lengths=None, causal=False):
    return of_lengths(attention_call(*shape, causal=causal), lengths)


def block(length, **options):
    return block_call(8, length, 128, 2, 512, projections=False, **options)


# name -> the call, the most kernels that forward and backward start, and some of these kernels.
CALLS = {
    "attention": (
        attention(4, 197, 3, 64),
        7,
        {"_flash_attention_forward": 1, "_flash_attention_backward": 1},
    ),
    "attention, causal": (
        attention(4, 197, 3, 64, causal=True),
        7,
        {"shaped_attention_gradients": 1},
    ),
    "attention, lengths": (
        attention(4, 197, 3, 64, lengths=(5, 0, 197, 3)),
        22,
        {"_flash_attention_backward": 1},
    ),
    "attention, float32": (attention(4, 197, 3, 64), 9, {"_efficient_attention_backward": 1}),
    "mlp": (
        mlp_call(3000, 64, 256, 64),
        11,
        {"parallel_mlp_activate": 2, "parallel_mlp_hidden": 1},
    ),
    "block": (block(197), 49, {"_flash_attention_forward": 1, "parallel_mlp_hidden": 1}),
    "block, recompute": (
        block(197, recompute=True),
        52,
        {"_flash_attention_forward": 2, "_flash_attention_backward": 1},
    ),
}
SHORT = {"attention": (attention(4, 77, 3, 64), 6), "block": (block(77), 47)}


def traced(call, dtype=torch.bfloat16):
    def step(tensors):
        for name in call.needed():
            tensors[name].requires_grad_()
        sum(t.sum() for t in outputs_of(function_of(call), call, tensors).values()).backward()

    steps = trace(step, call.typed(dtype))
    assert not names(steps, "host")
    started = names(steps, "torch", "triton", "cuda")
    # the test's sums of gradients
    return steps, started, started.total() - started["copy_"] - OF_THE_TEST


@needs_triton
@pytest.mark.parametrize("name", CALLS)
def test_what_a_step_starts(name):
    call, most, some = CALLS[name]
    if "float32" in name and torch.__version__ < "2.15":
        pytest.skip(
            "before torch 2.15 the fake of the memory-efficient attention's backward lacks an "
            "argument"
        )
    _, started, count = traced(call, torch.float32 if "float32" in name else torch.bfloat16)
    assert count <= most
    assert some.items() <= started.items()


@needs_triton
def test_what_the_mlp_takes_inside():
    """At most 16 MiB of act(h)."""
    call = mlp_call(100_000, 64, 256, 64)
    steps, _, _ = traced(call)
    activated = [
        each.arguments["activated"] for each in steps if each.name == "parallel_mlp_activate"
    ]
    sizes = [math.prod(each.shape) * each.dtype.itemsize for each in activated]
    assert 12 << 20 < max(sizes) <= 16 << 20


@needs_triton
@pytest.mark.skipif(backends.cuda_extension is None, reason=str(backends.cuda_extension_error))
@pytest.mark.parametrize("name", SHORT)
def test_what_a_step_of_short_sequences_starts(name):
    call, most = SHORT[name]
    steps, _, count = traced(call)
    assert count <= most
    assert names(steps, "cuda") == {"shaped_attention_fwd": 1, "shaped_attention_bwd": 1}


@pytest.mark.slow
@needs_triton
def test_tensors_of_more_than_2_to_the_31_elements():
    """Attention counts tokens in 32 bits, the MLP the elements of a chunk."""
    tensors = {name: torch.empty(40000, 257, 4, 64, device="meta") for name in "qkv"}
    tensors |= {name: torch.empty(4, device="meta") for name in ("alpha", "beta", "gamma")}
    tensors["lengths"] = torch.empty(40000, dtype=torch.int64, device="meta")
    _, started, _ = traced(Call("shaped_attention", tensors, {}))
    assert "_flash_attention_backward" in started
    shapes = {"x": (1100000, 512), "fc1_weight": (2048, 512), "fc2_weight": (512, 2048)}
    mlp = Call(
        "parallel_mlp",
        {name: torch.empty(shape, device="meta") for name, shape in shapes.items()},
        {},
    )
    steps, started, _ = traced(mlp)
    counts = [each.arguments["count"] for each in steps if each.name == "parallel_mlp_activate"]
    assert max(counts) <= 8 << 20  # elements of a chunk
    assert started["parallel_mlp_hidden"] == 1


@needs_cpu_kernels
def test_what_sdpa_keeps():
    """It keeps A v, C more elements a token than the kernels of shorter sequences; with `recompute`
    it does not.
    """
    kept = {}
    for length, name in ((80, "cpu"), (81, "cpu"), (81, "sdpa")):
        for recompute in (False, True):
            call = block(length, recompute=recompute)
            tensors = call.typed(torch.float32)
            saved = {}
            hooks = torch.autograd.graph.saved_tensors_hooks(
                lambda t, saved=saved: saved.setdefault(t.untyped_storage().data_ptr(), t),
                lambda t: t,
            )
            with simplclip.backend(name), hooks:
                forward = {k: t.requires_grad_(t.is_floating_point()) for k, t in tensors.items()}
                simplclip.ops.simplified_block(**forward, recompute=recompute)
            own = {t.untyped_storage().data_ptr() for t in tensors.values()}
            kept[length, name, recompute] = sum(
                t.nbytes for at, t in saved.items() if at not in own
            )
    c = 8 * 81 * 128 * 4
    assert kept[81, "sdpa", False] - kept[81, "cpu", False] == c
    assert kept[81, "sdpa", True] == kept[81, "cpu", True] < c
