"""Stated workspaces against what torch's allocator gives out in every call that the ops make on a CPU."""

import contextlib
import itertools
from collections import Counter
from dataclasses import is_dataclass
from unittest import mock

import pytest
import torch
from calls import MLP
from devices import DTYPES, needs_cpu_kernels
from memory_calls import SIMILARITY, attention_call, block_call, feature_call, forward_and_backward, mlp_call, similarity_call
from torch.utils._pytree import tree_leaves

from simplclip.memory.measure import cpu_peak_bytes
from simplclip.memory.workspaces import UnknownWorkspace, packing_bytes, workspace_bytes
from simplclip.ops import backends

SCALARS = 64  # bytes, of results that come after the peak
# What oneDNN packs is fitted to AVX512-BF16; of AMX, and of float16 where AVX512-FP16 multiplies it, only a bound is known.
UNFITTED = (4 << 20) * torch.cpu._is_amx_tile_supported()
NATIVE = {torch.bfloat16} | ({torch.float16} if torch.ops.mkldnn._is_mkldnn_fp16_supported() else set())


def tensors_of(tree) -> list:
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def storage_bytes(tree) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_of(tree)}.values())


@contextlib.contextmanager
def compared():
    """Compares each call of a function of the cpu backend with what is stated; gives the functions' names and bytes."""
    called = []

    def comparing(name, function):
        def run(*args):
            kept = []
            stated = workspace_bytes(name, "cpu", *args)
            on_meta = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in args]
            assert workspace_bytes(name, "cpu", *on_meta) == stated
            peak = cpu_peak_bytes(lambda: kept.append(function(*args)))
            measured = max(0, peak - storage_bytes(kept))
            halves = any(t.dtype in NATIVE for t in tensors_of([vars(arg) if is_dataclass(arg) else arg for arg in args]))
            slack = SCALARS + max(1 << 17, measured // 100, UNFITTED) * halves
            assert stated == pytest.approx(measured, abs=slack), (name, args)
            called.append((name, measured))
            return kept[0]

        return run

    rows = {name: row["cpu"] for name, row in backends.TABLE.items() if "cpu" in row}
    with backends.backend("cpu"), contextlib.ExitStack() as stack:
        for name, row in rows.items():
            patched = backends.Implementation(comparing(name, row.function), row.why_not)
            stack.enter_context(mock.patch.dict(backends.TABLE[name], cpu=patched))
        yield called


BUDGETS = (
    {},  # all rows stored
    {"scratch_bytes": 1 << 19, "store_bytes": 0},
    {"scratch_bytes": 1 << 19, "store_bytes": 1 << 19},  # some stored of one plane
    {"store_bytes": 1 << 19},  # and the others in one chunk
)


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SIMILARITY)
def test_similarity_on_cpu(name, dtype):
    with compared() as called:
        for (n, m, width), budget in itertools.product(((70, 97, 48), (401, 803, 128)), BUDGETS):
            call = similarity_call(name, n, m, width, ids=n % 2 == 1, **budget)
            forward_and_backward(call, call.typed(dtype))
    both = {"similarity_loss_fwd", "similarity_loss_bwd"}
    assert {name for name, _ in called} == ({"similarity_rows"} if name == "infonce" else both)


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_similarity_of_a_large_batch_on_cpu(dtype):
    """Several chunks of 1024 rows at the default budgets."""
    with compared() as called:
        for name in ("every term, own features", "infonce"):
            call = similarity_call(name, 2100, 4096, 64)
            forward_and_backward(call, call.typed(dtype))
    assert max(measured for _, measured in called) > 8 << 20


@needs_cpu_kernels
@pytest.mark.parametrize("frozen", [("image",), ("text",), ("image", "text")], ids="+".join)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_similarity_of_constants_on_cpu(frozen, dtype):
    with compared() as called:
        for name, budget in itertools.product(("hard, hadamard", "kl, projected", "every term, own features"), BUDGETS):
            call = similarity_call(name, 401, 803, 128, ids=True, **budget)
            forward_and_backward(call, call.typed(dtype), frozen)
    assert len(called) == 24


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_ops_on_cpu(dtype):
    less = 8 if dtype == torch.float16 else 1  # torch's products of float16 are slow
    shapes = [(t, c // less, f) for t, c, f in ((30, 40, 96), (3000, 64, 1100), (2500, 192, 2048))]
    calls = [(feature_call(3000, 96, normalize=normalize), ()) for normalize in (True, False)]
    calls += [(attention_call(3, 70, 4, 32, lengths=(70, 3, 0)), ()), (block_call(8, 77, 128, 2, 512), ())]
    for shape in shapes:
        calls += [(mlp_call(*shape), ()), (mlp_call(*shape), MLP)]
        calls.append((mlp_call(*shape, bias=False, act="relu"), ("fc2_weight",)))
    with compared() as called:
        for call, frozen in calls:
            forward_and_backward(call, call.typed(dtype), frozen)
        nothing = [torch.empty(shape, dtype=dtype) for shape in ((0, 24), (0, 256), (24, 256))]
        backends.TABLE["parallel_mlp_bwd"]["cpu"].function(*nothing, "gelu", True)
    # A block's functions are those of shaped_attention and, adding to the result, of parallel_mlp.
    count = Counter(name for name, _ in called)
    assert count.pop("parallel_mlp_fwd") >= 10  # one without a backward takes its rows in parts
    same = {"feature_loss_fwd": 2, "feature_loss_bwd": 2, "shaped_attention_fwd": 2, "shaped_attention_bwd": 2}
    assert count == {**same, "parallel_mlp_bwd": 8}


@needs_cpu_kernels
@pytest.mark.skipif(UNFITTED > 0, reason="not fitted to AMX")
@pytest.mark.parametrize("transposed", [False, True])
def test_packing_of_products(transposed):
    shapes = (20, 20, 20), (70, 33, 65), (514, 300, 700), (1024, 64, 4096), (384, 1100, 1024), (777, 512, 512), (8, 16, 32)
    for m, n, k in shapes:
        a = torch.randn(k, m).bfloat16().T if transposed else torch.randn(m, k).bfloat16()
        b, out = torch.randn(k, n).bfloat16(), torch.empty(m, n, dtype=torch.bfloat16)
        measured = cpu_peak_bytes(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
        stated = packing_bytes(m, n, k, torch.bfloat16, transposed=transposed)
        assert stated == pytest.approx(measured, abs=max(4096, measured // 100)), (m, n, k)


@needs_cpu_kernels
def test_a_function_without_a_workspace_is_an_error():
    lib = torch.library.Library("simplclip", "FRAGMENT")
    lib.define("silent_cpu_workspace(Tensor x) -> int")
    with pytest.raises(UnknownWorkspace, match="no workspace is stated for silent on backend cpu"):
        workspace_bytes("silent", "cpu", torch.empty(8))


def test_without_the_extension_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(backends, "extension", None)
    monkeypatch.setattr(backends, "extension_error", "it was not built")
    with pytest.raises(UnknownWorkspace, match="parallel_mlp_fwd on backend cpu cannot be predicted: it was not built"):
        workspace_bytes("parallel_mlp_fwd", "cpu")


@pytest.mark.skipif(backends.cuda_extension is None, reason=f"no CUDA kernels: {backends.cuda_extension_error}")
def test_cuda_attention_copies_what_is_not_aligned():
    """Rows that begin at multiples of 16 bytes are read and written in place; an allocation counts in units of 512 bytes."""
    joined = torch.empty(4, 50, 3 * 64 + 8, dtype=torch.bfloat16, device="meta")
    inside, shifted = (joined[:, :, i : i + 192].unflatten(2, (3, 64)) for i in (8, 4))
    gains, lse = torch.empty(3, 3, device="meta"), torch.empty(4, 3, 50, device="meta")
    copy = 4 * 50 * 3 * 64 * 2
    assert copy % 512 == 0
    assert workspace_bytes("shaped_attention_fwd", "cuda", inside, inside, inside, gains, None, 1.0, False) == 0
    assert workspace_bytes("shaped_attention_fwd", "cuda", inside, shifted, shifted, gains, None, 1.0, False) == 2 * copy
    single = torch.empty_strided((1, 50, 3, 64), (3, 192, 64, 1), dtype=torch.bfloat16, device="meta")
    assert workspace_bytes("shaped_attention_fwd", "cuda", single, single, single, gains, None, 1.0, False) == 0
    args = [shifted, inside, inside, inside, gains, lse, None, 1.0, False, inside, shifted, inside]
    assert workspace_bytes("shaped_attention_bwd", "cuda", *args) == 2 * copy + 512
