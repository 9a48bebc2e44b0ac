"""Calls that the Triton kernels serve, in the dtypes that they compute in."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from packaging.version import Version

from simplclip.common.terms import SWEPT as TERMS
from simplclip.ops.attention import library
from simplclip.selftest.calls import (
    Call,
    attention_call,
    block_call,
    mlp_call,
    of_lengths,
    similarity_call,
)
from support.ops.compare import Case

KINDS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}
ACTIVATIONS = ("gelu", "gelu_tanh", "quickgelu", "relu", "silu")


def pairs(n: int, m: int, *terms: str, **options) -> Callable[[], Call]:
    return functools.partial(similarity_call, n, m, (m - n) // 2, terms=terms or TERMS, **options)


def uneven(call: Call) -> Call:
    """Gives rows and columns very different statistics."""
    call.tensors["image"][::3] *= 30
    call.tensors["text"][::5] *= 1e-3
    call.tensors["text"][5::7] *= 10
    return call


def wide_mlp(act: str) -> Call:
    """Returns a call whose hidden layer is between -100 and 100."""
    call = mlp_call(150, 64, 160, 64, act=act)
    call.tensors["x"] *= 15
    return call


def lengths(values: list[int] | None, *shape: int, **options) -> Callable[[], Call]:
    return lambda: of_lengths(attention_call(*shape, **options), values)


BLOCKS = {"scratch_bytes": 0}  # of 128 x 128, the least
QUICK: dict[str, Callable[[], Call]] = {
    # a number of rows that fills a tile, columns one more, and one width of two that fills it
    "similarity_loss": pairs(64, 129, width=64, teacher_width=48, ids=True),
    "parallel_mlp": functools.partial(mlp_call, 130, 72, 200, 40),
    "shaped_attention": lengths([40, 0, 81], 3, 81, 2, 64, causal=True),
}
# what the suite runs in bfloat16 alone
QUICK_IN_BF16: dict[str, Callable[[], Call]] = {
    "every term, blocks": pairs(160, 320, width=64, teacher_width=112, ids=True, **BLOCKS),
    "attention, wide": lengths([33, 0], 2, 40, 1, 128),
    # several tiles of 128 rows, the last ones partly filled
    "contrastive, odd width": pairs(130, 133, "contrastive", width=72),
    "pair matching, ids, odd width": pairs(130, 133, *TERMS[:2], width=80, ids=True),
    # more rows than a group of programs has
    "contrastive, many parts": pairs(1030, 1111, "contrastive", width=16),
    # gradients of q, k and v with gaps between their rows
    "block": lambda: of_lengths(block_call(3, 20, 64, 2, 72), [20, 0, 7]),
}
CALLS: dict[str, Callable[[], Call]] = {
    **QUICK,
    **QUICK_IN_BF16,
    "similarity_loss, whole tiles of columns": pairs(70, 128, width=72, teacher_width=96),
    "contrastive": pairs(256, 384, "contrastive", width=512),
    "contrastive, one pair": pairs(1, 1, "contrastive", width=64),
    "contrastive, one side": pairs(70, 133, "contrastive", width=80, ids=True, symmetric=False),
    "contrastive, ids": pairs(70, 133, "contrastive", width=80, ids=True),
    "contrastive, blocks": lambda: uneven(
        similarity_call(300, 400, 50, terms=TERMS[:1], width=40, ids=True, **BLOCKS)
    ),
    "pair matching": pairs(70, 133, *TERMS[:2], width=64),
    "pair matching, one side, ids": pairs(70, 133, *TERMS[:2], width=80, ids=True, symmetric=False),
    "pair matching, blocks": pairs(200, 300, *TERMS[:2], width=72, ids=True, **BLOCKS),
    "relational": pairs(129, 129, "relational", width=64),
    "relational, one side": pairs(70, 133, "relational", width=64, symmetric=False),
    "every term": pairs(129, 129, width=64),
    "every term, cross-entropy": pairs(
        70, 133, width=80, teacher_width=31, divergence="cross_entropy"
    ),
    "every term, one side, ids": pairs(
        70, 133, width=64, ids=True, symmetric=False, teacher_width=112
    ),
    "scale 1000": pairs(70, 70, width=64, scale=1000.0),
    "scale -50": pairs(70, 70, width=64, scale=-50.0),
    "sigmoid": pairs(70, 133, "sigmoid", width=64),
    "sigmoid, ids, blocks": pairs(200, 300, "sigmoid", width=80, ids=True, **BLOCKS),
    "two sigmoids": pairs(
        70,
        133,
        "sigmoid",
        "pair_matching",
        width=80,
        ids=True,
        weights={"sigmoid": 1.0, "pair_matching": 0.5},
    ),
    **{f"parallel_mlp, {act}": functools.partial(wide_mlp, act) for act in ACTIVATIONS},
    "parallel_mlp, chunks": functools.partial(mlp_call, 200, 40, 80, 48),
    "attention": lengths(None, 2, 145, 2, 64),
    "attention, causal": lengths(None, 2, 81, 1, 48, causal=True),
    "attention, narrow, scale -2": lengths(None, 2, 130, 1, 20, scale=-2.0),
}


def case_of(name: str, kind: str, device: str = "cpu", need: list[str] | None = None) -> Case:
    """Returns a call as a case; rows that a kernel takes with gaps between them have some."""
    call = CALLS[name]()
    backend: str | dict[str, str]
    backend, layouts = "triton", {}
    if call.op == "parallel_mlp":
        layouts = {"fc2_weight": "rows_apart"}
    if call.op == "simplified_block":
        backend = {"shaped_attention": "sdpa", "parallel_mlp": "triton"}
    if call.op == "shaped_attention":
        backend = "sdpa"
        layouts = dict.fromkeys(("q", "k", "v", "grad out"), "rows_apart")
    if need is None:
        need = call.needed()
    tf32 = kind == "tf32"
    return Case(call, KINDS[kind], backend, need, tf32=tf32, device=device, layouts=layouts)


@contextlib.contextmanager
def kernels_alone(name: str) -> Iterator[None]:
    """Context of this library's kernels alone; parallel_mlp in chunks if the name says so."""
    plain = {"_write_terms": None, "_gradients_without_softmax": None}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(library, **plain))
        if "chunks" in name:
            # 64 rows at a time
            stack.enter_context(mock.patch("simplclip.kernels.mlp.launch.SCRATCH_BYTES", 0))
        yield


def skip_without_fence(name: str, kind: str, sm: int) -> None:
    """Skips what tests/ptx rightly reports: wgmma of Triton 3.6 after cp.async."""
    import triton

    uses_wgmma = sm == 90 and kind not in ("fp32", "float32") and "attention" not in name
    if uses_wgmma and Version(triton.__version__) < Version("3.9"):
        pytest.skip("Triton 3.6 has no fence.proxy.async between cp.async and wgmma")
