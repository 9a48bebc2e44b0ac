"""Workspaces stated for GPUs: launchers of Triton kernels on fake tensors, with kernels that do nothing; and on a GPU."""

import contextlib
import importlib
import itertools
import weakref
from dataclasses import replace
from unittest import mock

import pytest
import test_parallel_mlp_triton as mlp_cases
import test_shaped_attention_triton as attention_cases
import torch
import triton_cases
from cpu_kernels import DTYPES
from interpreter import NO_GPU, needs_triton
from test_workspaces import check, storage_bytes, tensors_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from simplclip.ops import backends, workspaces_gpu
from simplclip.ops.workspaces import workspace_bytes

GRAIN = 512  # bytes that CUDA's allocator rounds to


class NoKernel:
    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


class LiveBytes(TorchDispatchMode):
    """Live bytes, and their peak, of the storages that ops make, each rounded up as CUDA's allocator does."""

    def __init__(self, *given):
        super().__init__()
        self.live = self.peak = 0
        self.known = weakref.WeakSet(t.untyped_storage() for t in tensors_of(given))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tensors_of(out):
            storage = t.untyped_storage()
            if storage not in self.known:
                self.known.add(storage)
                size = -(-storage.nbytes() // GRAIN) * GRAIN
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, size)
        return out

    def _free(self, size: int) -> None:
        self.live -= size


@pytest.fixture
def launchers():
    """backends.TABLE's Triton functions with kernels that do nothing, for fake tensors of an RTX 3090."""
    from simplclip.kernels import launch

    with contextlib.ExitStack() as stack:
        for name in ("similarity_loss", "feature_loss", "shaped_attention", "parallel_mlp"):
            module = importlib.import_module(f"simplclip.kernels.{name}")
            for kernel in [k for k in vars(module) if k.endswith("_kernel")]:
                stack.enter_context(mock.patch.object(module, kernel, NoKernel()))
        stack.enter_context(mock.patch.object(launch, "_device", return_value=workspaces_gpu.ASSUMED))
        stack.enter_context(mock.patch("torch.cuda.device_of", return_value=contextlib.nullcontext()))
        stack.enter_context(FakeTensorMode())
        yield


def on_gpu(tree, fake: bool = True):
    """Tensors of the same shapes, strides and dtypes on a CUDA device."""

    def move(t):
        if not isinstance(t, torch.Tensor):
            return t
        if not fake:
            return t.cuda()
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")

    return [move(t) for t in tree]


def call(name: str, backend: str, args: list, fake: bool = True):
    """Calls the backend's function and compares what it takes with what is stated; its result."""
    function = backends.TABLE[name][backend].function
    what = f"{name} {[tuple(t.shape) if isinstance(t, torch.Tensor) else t for t in args]}"
    stated = workspace_bytes(name, backend, *args)
    if fake:
        with LiveBytes(args) as memory:
            kept = function(*args)
        # Vectors of a few scalars are not stated one by one.
        check(stated, memory.peak - storage_bytes(kept, GRAIN), 1 << 12, what)
        return kept
    function(*args)  # compiles, and libraries allocate what they keep
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    kept = function(*args)
    torch.cuda.synchronize()
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    measured = max(0, peak - storage_bytes(kept))
    check(stated, measured, max(1 << 18, measured // 100), what)  # reductions have some scratch of their own
    return kept


def call_similarity(case: triton_cases.Case, fake: bool = True) -> None:
    tensors = on_gpu(triton_cases.tensors(case, "cpu"), fake)
    mode = (case.offset, case.softmax, case.columns, case.negatives, case.relational, case.interactive, case.entropy)
    rows, columns, stored = call("similarity_loss_fwd", "triton", [*tensors, *mode, case.chunk, 0], fake)
    for need_image, need_text in ((True, True), (False, True), (True, False)):
        args = [rows, columns, *tensors, rows, columns, stored, *mode, need_image, need_text, case.chunk]
        call("similarity_loss_bwd", "triton", args, fake)


SIZES = ({"n": 300, "m": 410, "offset": 20, "width": 64}, {"n": 2048, "m": 4096, "offset": 0, "width": 256, "ids": False})


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", triton_cases.MODES)
def test_similarity_loss_in_triton(mode, dtype, launchers):
    for size, chunk, columns in itertools.product(SIZES, (128, 1024), (True, False)):
        case = replace(triton_cases.MODES[mode], dtype=dtype, chunk=chunk, columns=columns, **size)
        call_similarity(case)
        if case.interactive:
            call_similarity(replace(case, teacher_width=128))


def call_rows(dtype: torch.dtype, fake: bool = True) -> None:
    for size, chunk, attend in itertools.product(SIZES, (128, 1024), (True, False)):
        image, text, scale, *_, ids, text_ids = triton_cases.tensors(triton_cases.Case(dtype=dtype, **size), "cpu")
        tensors = on_gpu([image, text, scale, ids, text_ids], fake)
        call("similarity_rows", "triton", [*tensors, size["offset"], attend, chunk], fake)


def call_feature_loss(dtype: torch.dtype, fake: bool = True) -> None:
    for (n, d), normalize in itertools.product(((70, 40), (100_000, 48), (300, 9000)), (True, False)):
        student, teacher = on_gpu([torch.empty(n, d, dtype=dtype), torch.empty(n, d)], fake)
        loss, norms = call("feature_loss_fwd", "triton", [student, teacher, False, 1.0, normalize], fake)
        call("feature_loss_bwd", "triton", [loss, student, teacher, norms, False, 1.0], fake)


def call_attention(backend: str, dtype: torch.dtype, fake: bool = True) -> None:
    for length, k, layout in itertools.product((40, 257), (32, 80), ("joined", "heads first")):
        case = attention_cases.Case(64, length, 4, k, False, (length,) * 64, dtype, layout=layout)
        inputs, into, gains, lengths = attention_cases.tensors(case, "cpu")
        q, keys, v, grad = on_gpu(inputs, fake)
        mode = [*on_gpu([gains.float(), lengths], fake)]
        _, lse = call("shaped_attention_fwd", backend, [q, keys, v, *mode, 0.3, False], fake)
        args = [grad, q, keys, v, mode[0], lse, mode[1], 0.3, False, *on_gpu(into, fake)]
        call("shaped_attention_bwd", backend, args, fake)


def call_mlp(dtype: torch.dtype, fake: bool = True) -> None:
    for t, c, f in ((0, 64, 256), (300, 64, 256), (20_000, 64, 256), (3000, 768, 3072)):
        h, weight, bias, out, grad = on_gpu(mlp_cases.tensors(mlp_cases.Case(t=t, c=c, f=f, dtype=dtype), "cpu"), fake)
        call("parallel_mlp_fwd", "triton", [h, weight, bias, "gelu", out, True], fake)
        call("parallel_mlp_fwd", "triton", [h, weight.T.contiguous().T, None, "gelu", out, False], fake)
        for need_weight in (True, False):
            call("parallel_mlp_bwd", "triton", [grad, h, weight, "gelu", need_weight], fake)
        call("parallel_mlp_bwd", "triton", [grad[:, :1].expand(t, c), h, weight, "gelu", True], fake)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_ops_in_triton(dtype, launchers):
    call_rows(dtype)
    call_feature_loss(dtype)
    call_attention("triton", dtype)
    call_mlp(dtype)


on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))]


@needs_triton
@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=on_a_gpu) for dtype in DTYPES])
def test_on_gpu(dtype):
    for mode, size in itertools.product(triton_cases.MODES, SIZES):
        call_similarity(replace(triton_cases.MODES[mode], dtype=dtype, chunk=1024, **size), fake=False)
    call_rows(dtype, fake=False)
    call_feature_loss(dtype, fake=False)
    call_attention("triton", dtype, fake=False)
    call_mlp(dtype, fake=False)


@pytest.mark.skipif(backends.cuda_extension is None, reason=f"no CUDA kernels: {backends.cuda_extension_error}")
@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=on_a_gpu) for dtype in DTYPES])
def test_cuda_attention_on_gpu(dtype):
    call_attention("cuda", dtype, fake=False)


def test_cuda_attention_copies_what_is_not_aligned():
    """By csrc/cuda/shaped_attention.cpp: rows that begin at multiples of 16 bytes are read and written in place."""
    joined = torch.empty(4, 50, 3 * 64 + 8, dtype=torch.bfloat16, device="meta")
    inside, shifted = (joined[:, :, i : i + 192].unflatten(2, (3, 64)) for i in (8, 4))
    gains, lse = torch.empty(3, 3, device="meta"), torch.empty(4, 3, 50, device="meta")
    copy = 4 * 50 * 3 * 64 * 2
    assert workspace_bytes("shaped_attention_fwd", "cuda", inside, inside, inside, gains, None, 1.0, False) == 0
    assert workspace_bytes("shaped_attention_fwd", "cuda", inside, shifted, shifted, gains, None, 1.0, False) == 2 * copy
    single = torch.empty_strided((1, 50, 3, 64), (3, 192, 64, 1), dtype=torch.bfloat16, device="meta")
    assert workspace_bytes("shaped_attention_fwd", "cuda", single, single, single, gains, None, 1.0, False) == 0
    args = [shifted, inside, inside, inside, gains, lse, None, 1.0, False, inside, shifted, inside]
    assert workspace_bytes("shaped_attention_bwd", "cuda", *args) == 2 * copy + 4 * 4 * 3 * 3


def test_the_device_assumed_is_used_where_there_is_none(monkeypatch):
    """More multiprocessors, more ranges of tokens, each with a gradient of the weight."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = [torch.empty(20_000, 64, device="meta"), torch.empty(20_000, 256, device="meta")]
    args += [torch.empty(64, 256, device="meta"), "gelu", True]
    stated = workspace_bytes("parallel_mlp_bwd", "triton", *args)
    monkeypatch.setattr(workspaces_gpu, "ASSUMED", (86, 8))
    assert 0 < workspace_bytes("parallel_mlp_bwd", "triton", *args) < stated


def test_allocations_are_rounded_on_a_gpu():
    """Of feature_loss, three programs' sums and, beside the loss, two numbers in float64."""
    for device, mode, expected in (("meta", contextlib.nullcontext(), 24), ("cuda", FakeTensorMode(), 1024)):
        with mode:
            features = torch.empty(70, 40, device=device)
        assert workspace_bytes("feature_loss_fwd", "triton", features, features, False, 1.0, True) == expected
