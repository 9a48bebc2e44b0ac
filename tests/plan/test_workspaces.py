"""Stated workspaces against the allocator's measurements in every call that the ops make on a
CPU.
"""

import contextlib
import itertools
from collections import Counter as Bag
from functools import partial
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from simplclip.calls.attention import AttentionCall, AttentionInto
from simplclip.calls.fields import flat, schema_of
from simplclip.calls.mlp import HiddenGradient
from simplclip.ops import backends, registry
from simplclip.ops.mlp.cpu import CpuMlp
from simplclip.plan.actual import cpu_peak_bytes
from simplclip.plan.count import UncountedOp, workspace_bytes
from simplclip.selftest.calls import MLP, block_call
from support.devices import DTYPES, NATIVE_BF16, NATIVE_FP16, UNCOPIED_DTYPES, needs_cpu_kernels
from support.ops.predicted_calls import (
    SIMILARITY,
    attention_call,
    forward_and_backward,
    mlp_call,
    similarity_call,
)

SCALARS = 64  # bytes of results that are made after the peak
# The copies of oneDNN in products of half types are not stated; this bounds them for one thread.
COPIED = 4 << 20
NATIVE = {torch.bfloat16: NATIVE_BF16, torch.float16: NATIVE_FP16}


def storage_bytes(tree) -> int:
    storages = [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


@contextlib.contextmanager
def compared(dtype):
    """Compares each call of the cpu backend's functions with the stated workspace; yields a list of
    the functions' names.
    """
    called = []

    def compare(name, function, call):
        kept = []
        stated = workspace_bytes(f"{name}_cpu", flat(call))
        on_meta = tree_map_only(torch.Tensor, lambda t: t.to("meta"), flat(call))
        assert workspace_bytes(f"{name}_cpu", on_meta) == stated
        peak = cpu_peak_bytes(lambda: kept.append(function(call)))
        measured = max(0, peak - storage_bytes(kept))
        assert -SCALARS <= measured - stated <= SCALARS + COPIED * NATIVE.get(dtype, False), (
            name,
            call,
        )
        called.append(name)
        return kept[0]

    with backends.backend("cpu"), contextlib.ExitStack() as stack:
        # functions that earlier calls selected
        stack.enter_context(mock.patch.dict(registry._selected, clear=True))
        for name, row in backends.TABLE.items():
            if "cpu" in row:
                patched = staticmethod(partial(compare, name, getattr(row["cpu"], name)))
                stack.enter_context(mock.patch.object(row["cpu"], name, patched))
        yield called


BUDGETS = (
    {},  # all rows stored
    {"scratch_bytes": 1 << 19, "store_bytes": 0},
    {"scratch_bytes": 1 << 19, "store_bytes": 1 << 19},  # some rows of one plane stored
    {"store_bytes": 1 << 19},  # and other rows in one chunk
)
SHAPES = (70, 97, 48), (401, 803, 128)
FROZEN = ("image",), ("text",), ("image", "text")


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SIMILARITY)
def test_similarity_on_cpu(name, dtype):
    cases = [*itertools.product(SHAPES, BUDGETS, [()])]
    if name in ("hadamard", "relational, rows only", "every term, own features"):
        cases += itertools.product(SHAPES[1:], BUDGETS, FROZEN)
    with compared(dtype) as called:
        for (n, m, width), budget, frozen in cases:
            call = similarity_call(name, n, m, width, ids=n % 2 == 1, **budget)
            forward_and_backward(call, call.typed(dtype), frozen)
    softmax, sigmoid = {"similarity_loss_fwd", "similarity_loss_bwd"}, {"similarity_sigmoid"}
    every = dict.fromkeys(("every term", "every term, own features"), softmax | sigmoid)
    assert set(called) == ({"sigmoid": sigmoid, "hadamard": sigmoid} | every).get(name, softmax)


@pytest.mark.slow
@needs_cpu_kernels
@pytest.mark.parametrize("dtype", UNCOPIED_DTYPES)
def test_other_ops_on_cpu(dtype):
    less = 8 if dtype == torch.float16 else 1  # torch's float16 products are slow
    calls = [(attention_call(3, 70, 4, 32, lengths=(70, 3, 0)), ())]
    calls.append((block_call(8, 77, 128, 2, 512, projections=False), ()))
    for t, c, f in (30, 40 // less, 96), (3000, 64 // less, 1100), (2500, 192 // less, 2048):
        calls += [(mlp_call(t, c, f), ()), (mlp_call(t, c, f), MLP)]
        calls.append((mlp_call(t, c, f, bias=False, act="relu"), ("fc2_weight",)))
    with compared(dtype) as called:
        for call, frozen in calls:
            forward_and_backward(call, call.typed(dtype), frozen)
        nothing = [torch.empty(shape, dtype=dtype) for shape in ((0, 24), (0, 256), (24, 256))]
        CpuMlp.parallel_mlp_bwd(HiddenGradient(*nothing, "gelu", True))
    # A block runs the functions of shaped_attention and, adding to the result, those of
    # parallel_mlp.
    count = Bag(called)
    assert count.pop("parallel_mlp_fwd") >= 10  # without a backward, the op takes its rows in parts
    assert count == {"shaped_attention_fwd": 2, "shaped_attention_bwd": 2, "parallel_mlp_bwd": 8}


def test_what_has_no_workspace_is_an_error():
    lib = torch.library.Library("simplclip", "FRAGMENT")
    lib.define(f"silent_cpu_workspace({schema_of(HiddenGradient)}) -> int")
    call = HiddenGradient(*[torch.empty(8, 8)] * 3, "gelu", True)
    with pytest.raises(UncountedOp, match="no workspace is stated for silent_cpu"):
        workspace_bytes("silent_cpu", flat(call))


@pytest.mark.skipif(
    backends.cuda_extension is None, reason=f"no CUDA kernels: {backends.cuda_extension_error}"
)
def test_cuda_attention_copies_what_is_not_aligned():
    """Rows at multiples of 16 bytes are read and written in place; allocations count in units of
    512 bytes.
    """
    joined = torch.empty(4, 50, 3 * 64 + 8, dtype=torch.bfloat16, device="meta")
    inside, shifted = (joined[:, :, i : i + 192].unflatten(2, (3, 64)) for i in (8, 4))
    single = torch.empty_strided(
        (1, 50, 3, 64), (3, 192, 64, 1), dtype=torch.bfloat16, device="meta"
    )
    gains = torch.empty(3, 3, device="meta")
    lse = torch.empty(4, 3, 50, device="meta")
    copy = 4 * 50 * 3 * 64 * 2
    for q, k, v, stated in (
        (inside, inside, inside, 0),
        (inside, shifted, shifted, 2 * copy),
        (single, single, single, 0),
    ):
        call = AttentionCall(q, k, v, gains, None, 1.0, False)
        assert workspace_bytes("shaped_attention_fwd_cuda", flat(call)) == stated
    backward = AttentionInto(
        inside, inside, inside, gains, None, 1.0, False, shifted, lse, lse, inside, shifted, inside
    )
    assert workspace_bytes("shaped_attention_bwd_cuda", flat(backward)) == 2 * copy + 512
