"""Memory of a step of the ops on a CPU beside their inputs, and what backward of simplified_block
keeps and computes.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from simplclip.ops import similarity_loss, simplified_block
from simplclip.selftest.calls import Call, attention_call, block_call, feature_call, mlp_call
from simplclip.selftest.compare import outputs_of
from support.devices import cpu_peak_bytes, needs_cpu_kernels
from support.ops.compare import function_of

MIB = 1 << 20


def of_feature_loss() -> Call:
    call = feature_call(40_000, 256)
    call.dtypes = {"student": torch.bfloat16, "teacher": torch.float16}
    return call


# Calls, and the most bytes that a step adds: results, gradients, what is kept for backward, and
# some scratch.
STEPS: dict[str, tuple[Callable[[], Call], int]] = {
    f"attention, {length} tokens": (  # one log-sum-exp a token is kept
        partial(attention_call, 4, length, 2, width),
        4 * 4 * length * 2 * (4 * width + 1) + 4096,
    )
    for length, width in ((77, 64), (300, 20))
}
STEPS |= {
    "mlp": (
        # one hidden layer is kept, and written over in backward
        lambda: mlp_call(6000, 64, 2048, 64),
        4 * (6000 * 2048 + 2 * 6000 * 64 + 2 * 64 * 2048 + 2048 + 64) + 8 * MIB + 4096,
    ),
    "feature": (of_feature_loss, 40_000 * 2 * 256 + 8 * MIB),  # nothing is kept
}


@needs_cpu_kernels
@pytest.mark.parametrize("name", STEPS)
def test_peak_of_a_step(name):
    make, most = STEPS[name]
    call = make()
    tensors = call.typed(torch.float32)
    leaves = [tensors[key].requires_grad_() for key in call.needed()]
    with torch.no_grad():
        grad = torch.ones_like(outputs_of(function_of(call), call, tensors)["out"])

    def step():
        for leaf in leaves:
            leaf.grad = None
        outputs_of(function_of(call), call, tensors)["out"].backward(grad)

    step()
    for leaf in leaves:
        leaf.grad = None
    assert cpu_peak_bytes(step) <= most


@needs_cpu_kernels
@pytest.mark.parametrize("op", ["parallel_mlp", "simplified_block"])
def test_without_gradients_only_some_rows_of_the_hidden_layer_are_kept(op):
    tokens, width, hidden = 7700, 128, 2048
    call = mlp_call(tokens, width, hidden, width)
    if op == "simplified_block":
        call = block_call(100, 77, width, 2, hidden, projections=False)
    tensors = call.typed(torch.float32)
    peak = cpu_peak_bytes(lambda: outputs_of(function_of(call), call, tensors))
    assert peak < 0.8 * 4 * tokens * hidden  # scratch of 24 MiB, and five times x


@needs_cpu_kernels
def test_a_block_keeps_its_input_queries_keys_and_hidden_layer_or_its_input_alone():
    b, length, c = 8, 77, 128
    call = block_call(b, length, c, 2, 512, projections=False)
    tensors = {name: t.requires_grad_() for name, t in call.typed(torch.float32).items()}
    parameters = {t.untyped_storage().data_ptr() for t in tensors.values() if t.dim() < 3}
    tokens, lse = 4 * b * length * c, 4 * b * 2 * length
    for recompute, expected in ((False, 7 * tokens + lse), (True, tokens + lse)):
        kept = {}

        def pack(t, kept=kept):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            simplified_block(**tensors, recompute=recompute)
        sizes = [size for at, size in kept.items() if at not in parameters and size > 4 * 3 * 2]
        assert sum(sizes) == expected


def test_frozen_tensors_of_a_block_cost_no_products(monkeypatch):
    calls = []
    for name in ("mm", "addmm", "addmm_"):
        owner = torch.Tensor if name == "addmm_" else torch
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *a, original=original, **k: calls.append(1) or original(*a, **k)
        )
    counts = {}
    for trained in ("x", "qk_weight", "fc1_weight", "fc2_bias", "all"):
        tensors = block_call(projections=False).tensors
        tensors = {name: t.requires_grad_(trained in (name, "all")) for name, t in tensors.items()}
        out = simplified_block(**tensors)
        calls.clear()
        out.sum().backward()
        counts[trained] = len(calls)
    # x: two products into the gradient of n; each weight: one product; parallel_mlp_bwd's products
    # are the backend's.
    assert counts == {"x": 2, "qk_weight": 1, "fc1_weight": 1, "fc2_bias": 0, "all": 4}


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "width"), [(1024, 512), (2048, 384), (2048, 512), (2048, 768)])
def test_the_contrastive_loss_takes_less_memory_than_torchs_chunks(n, width, dtype):
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("needs torch 2.13 or later, which has linear_cross_entropy")
    leaves = [torch.randn(n, width, dtype=dtype, requires_grad=True) for _ in range(2)]
    scale = torch.tensor(10.0)
    labels = torch.arange(n)
    chunks = torch.nn.LinearCrossEntropyOptions()

    def torchs():
        x, y = leaves
        by_image = F.linear_cross_entropy(scale * x, y, labels, options=chunks)
        (by_image + F.linear_cross_entropy(scale * y, x, labels, options=chunks)).backward()

    def ours():
        similarity_loss(*leaves, scale)["contrastive"].backward()

    peaks = []
    for step in (torchs, ours):
        for leaf in leaves:
            leaf.grad = None
        peaks.append(cpu_peak_bytes(step))
    assert peaks[1] < peaks[0]


def rows_kept(n, width, trained, **options):
    """Returns how many rows of the matrix forward keeps for backward."""
    tensors = dict(zip(("image", "text"), torch.randn(2, n, width)))
    tensors["logit_scale"] = torch.tensor(10.0)
    tensors[trained].requires_grad_()
    kept = []

    def pack(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        similarity_loss(**tensors, **options)
    (rows,) = [t.shape[1] for t in kept if t.dim() == 3 and t.shape[2] == n]
    return rows


@needs_cpu_kernels
def test_a_larger_budget_keeps_all_rows():
    assert rows_kept(1000, 64, "image") == 0
    assert rows_kept(1000, 64, "image", store_bytes=1 << 30) == 1000


@needs_cpu_kernels
@pytest.mark.parametrize("trained", ["image", "logit_scale"])
@pytest.mark.parametrize("n", [1024, 1536])
def test_all_rows_are_kept_where_a_smaller_chunk_leaves_room(n, trained):
    assert rows_kept(n, 512, trained) == n


@needs_cpu_kernels
@pytest.mark.parametrize("terms", [("contrastive",), ("sigmoid",)])
@pytest.mark.parametrize(("m", "width"), [(2048, 64), (2048, 128), (6000, 64), (2048, 512)])
def test_a_chunk_and_rows_take_twice_the_gradients(m, width, terms):
    image, text = (torch.randn(rows, width, requires_grad=True) for rows in (2048, m))

    def step():
        image.grad = text.grad = None
        losses = similarity_loss(image, text, 10.0, logit_bias=-5.0, terms=terms)
        losses[terms[0]].backward()

    step()
    image.grad = text.grad = None
    gradients = 4 * (2048 + m) * width
    if terms == ("sigmoid",):  # forward keeps them, and backward scales them
        gradients += gradients
    assert cpu_peak_bytes(step) <= gradients + 2 * 4 * (2048 + m) * width
