"""Stated workspaces against what torch's allocator gives out: every call of the ops on a CPU, launchers on fake tensors."""

import contextlib
import importlib
import itertools
import re
import weakref
from dataclasses import replace
from unittest import mock

import pytest
import test_parallel_mlp_triton as mlp_cases
import test_shaped_attention_triton as attention_cases
import torch
import triton_cases
from cpu_kernels import needs_cpu_kernels
from interpreter import NO_GPU, needs_triton
from similarity import TEACHER, make_inputs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.measure import cpu_peak_bytes
from simplclip import backends
from simplclip.ops import feature_loss, parallel_mlp, shaped_attention, similarity_loss, simplified_block, workspaces_gpu
from simplclip.ops.similarity_loss import TERMS
from simplclip.ops.workspaces import STATED, UnknownWorkspace, workspace_bytes
from simplclip.ops.workspaces_cpu import packing_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEATURE_NAMES = ("image", "text", "teacher_image", "teacher_text", "projected_image", "projected_text")
SCALARS = 64  # bytes, of results that come after the peak
# What oneDNN packs is fitted to AVX512-BF16; of AMX only a bound is known.
UNFITTED = (4 << 20) * torch.cpu._is_amx_tile_supported()


def check(stated: int, measured: int, slack: int, what: str) -> None:
    assert abs(stated - measured) <= slack, f"{what}: stated {stated}, measured {measured}"


def tensors_of(tree) -> list:
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def storage_bytes(tree) -> int:
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors_of(tree)}
    return sum(s.nbytes() for s in storages.values())


# -- cpu ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def compared():
    """Compares each call of a function of the cpu backend with what is stated; gives the list of the functions' names."""
    called = []

    def comparing(name, function):
        def run(*args):
            kept = []
            stated = workspace_bytes(name, "cpu", *args)
            on_meta = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in args]
            assert workspace_bytes(name, "cpu", *on_meta) == stated
            peak = cpu_peak_bytes(lambda: kept.append(function(*args)))
            measured = max(0, peak - storage_bytes(kept))
            halves = any(t.dtype == torch.bfloat16 for t in tensors_of(args))
            slack = SCALARS + max(1 << 16, measured // 100, UNFITTED) * halves
            check(stated, measured, slack, f"{name} {[tuple(t.shape) if isinstance(t, torch.Tensor) else t for t in args]}")
            called.append((name, stated, measured))
            return kept[0]

        return run

    rows = {name: row["cpu"] for name, row in backends.TABLE.items() if "cpu" in row}
    with one_thread(), backends.backend("cpu"), contextlib.ExitStack() as stack:
        for name, row in rows.items():
            patched = backends.Implementation(comparing(name, row.function), row.why_not)
            stack.enter_context(mock.patch.dict(backends.TABLE[name], cpu=patched))
        yield called


SIMILARITY = {
    "contrastive": {"terms": ("contrastive",)},
    "rows only": {"terms": ("contrastive",), "symmetric": False},
    "all negatives": {"terms": ("pair_matching",)},
    "hard": {"terms": ("contrastive", "pair_matching"), "negatives": "hard"},
    "hadamard": {"terms": ("pair_matching",), "plane": "hadamard"},
    "hard, hadamard": {"terms": ("pair_matching",), "plane": "hadamard", "negatives": "hard"},
    "relational": {"terms": ("relational",)},
    "kl": {"terms": ("interactive",), "interactive": "kl"},
    "kl, projected": {"terms": ("interactive",), "interactive": "kl", "teacher_width": 80},
    "kl, projected, rows only": {"terms": ("interactive",), "interactive": "kl", "teacher_width": 80, "symmetric": False},
    "infonce": {"terms": ("interactive",), "teacher_width": 80},
    "every term": {"terms": TERMS, "interactive": "kl", "negatives": "hard", "plane": "hadamard", "teacher_width": 80},
    "every term, own features": {"terms": TERMS, "interactive": "kl"},
}
BUDGETS = (
    {},  # all rows stored
    {"scratch_bytes": 1 << 19, "store_bytes": 0},
    {"scratch_bytes": 1 << 19, "store_bytes": 1 << 20},  # some stored of one plane
)


def run_similarity(case: dict, n: int, m: int, width: int, dtype: torch.dtype, frozen: tuple = (), **options) -> None:
    case = dict(case)
    build = {k: case.pop(k) for k in ("terms", "plane", "teacher_width") if k in case}
    leaves, built = make_inputs(n, m, (m - n) // 2, ids=n % 2 == 1, width=width, **build)
    args = {k: v.to(dtype if k in FEATURE_NAMES else torch.float32) for k, v in leaves.items()}
    for name, value in args.items():
        value.requires_grad_(name not in TEACHER and name not in frozen)
    if "plane_weight" in args:
        args["plane"] = args.pop("plane_weight"), args.pop("plane_bias")
    sum(similarity_loss(**args, **built, **case, **options).values()).backward()


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SIMILARITY)
def test_similarity_on_cpu(name, dtype):
    with compared() as called:
        for (n, m, width), budgets in itertools.product(((70, 97, 48), (601, 803, 128)), BUDGETS):
            run_similarity(SIMILARITY[name], n, m, width, dtype, **budgets)
    names = {name for name, *_ in called}
    assert names == ({"similarity_rows"} if name == "infonce" else {"similarity_loss_fwd", "similarity_loss_bwd"})


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_similarity_of_a_large_batch_on_cpu(dtype):
    """Several chunks of 1024 rows at the default budgets."""
    with compared() as called:
        run_similarity(SIMILARITY["every term, own features"], 2100, 4096, 64, dtype)
        run_similarity(SIMILARITY["infonce"], 2100, 4096, 64, dtype)
    assert max(measured for _, _, measured in called) > 8 << 20


@needs_cpu_kernels
@pytest.mark.parametrize("frozen", [("image",), ("text",), ("image", "text")], ids="+".join)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_similarity_of_constants_on_cpu(frozen, dtype):
    with compared() as called:
        for name, budgets in itertools.product(("hard, hadamard", "kl, projected", "every term, own features"), BUDGETS):
            run_similarity(SIMILARITY[name], 601, 803, 128, dtype, frozen, **budgets)
    assert len(called) == 18


def leaves_of(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_feature_loss_and_attention_on_cpu(dtype):
    with compared() as called:
        for normalize in (True, False):
            feature_loss(*leaves_of(dtype, (3000, 96)), torch.randn(3000, 96), normalize=normalize).backward()
        q, k, v = leaves_of(dtype, *[(3, 70, 4, 32)] * 3)
        gains = [torch.ones(4, requires_grad=True) for _ in range(3)]
        shaped_attention(q, k, v, *gains, causal=True, lengths=torch.tensor([70, 3, 0])).sum().backward()
    assert len(called) == 6


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_parallel_mlp_on_cpu(dtype):
    with compared() as called:
        for t, c, f in ((30, 40, 96), (3000, 64, 1100), (2500, 192, 2048)):
            x, w1, b1, w2, b2 = leaves_of(dtype, (t, c), (f, c), (f,), (c, f), (c,))
            parallel_mlp(x, w1, b1, w2, b2).sum().backward()
            parallel_mlp(x, w1, None, w2.detach(), None, act="relu").sum().backward()  # no gradient of the second weight
            with torch.no_grad():
                parallel_mlp(x, w1, b1, w2, b2)
        of_nothing = torch.empty(0, c, dtype=dtype), torch.empty(0, f, dtype=dtype), w2.detach(), "gelu", True
        backends.TABLE["parallel_mlp_bwd"]["cpu"].function(*of_nothing)
    assert {name for name, *_ in called} == {"parallel_mlp_fwd", "parallel_mlp_bwd"}
    assert sum(name == "parallel_mlp_bwd" for name, *_ in called) == 7


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_simplified_block_on_cpu(dtype):
    """Its functions are those of shaped_attention and, adding to the result, of parallel_mlp."""
    b, length, c, heads, f = 8, 77, 128, 2, 512
    x, qk, w1, b1, w2, b2, norm = leaves_of(dtype, (b, length, c), (2 * c, c), (f, c), (f,), (c, f), (c,), (c,))
    gains = dict(zip(("alpha", "beta", "gamma"), (torch.ones(heads, requires_grad=True) for _ in range(3))))
    with compared() as called:
        simplified_block(x, qk, w1, b1, w2, b2, norm_weight=norm, norm_bias=norm, **gains).sum().backward()
    assert sorted(name for name, *_ in called) == sorted(
        f"{op}_{way}" for op in ("shaped_attention", "parallel_mlp") for way in ("fwd", "bwd")
    )


@needs_cpu_kernels
@pytest.mark.skipif(UNFITTED > 0, reason="not fitted to AMX")
@pytest.mark.parametrize("transposed", [False, True])
def test_packing_of_products(transposed):
    shapes = (20, 20, 20), (70, 33, 65), (514, 300, 700), (1024, 64, 4096), (384, 1100, 1024), (777, 512, 512), (8, 16, 32)
    for m, n, k in shapes:
        a = torch.randn(k, m).bfloat16().T if transposed else torch.randn(m, k).bfloat16()
        b = torch.randn(k, n).bfloat16()
        out = torch.empty(m, n, dtype=torch.bfloat16)
        with one_thread():
            measured = cpu_peak_bytes(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
            stated = packing_bytes(m, n, k, torch.bfloat16, transposed=transposed)
        check(stated, measured, max(4096, measured // 100), f"{(m, n, k)}")


# -- triton ------------------------------------------------------------------------------------------------------------------


class NoKernel:
    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


class LiveBytes(TorchDispatchMode):
    """Live bytes, and their peak, of the storages that ops make, each rounded up to 512 as CUDA's allocator does."""

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
                size = -(-storage.nbytes() // 512) * 512
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
        check(stated, memory.peak - rounded_bytes(kept), 1 << 14, what)
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


def rounded_bytes(tree) -> int:
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_of(tree)}
    return sum(-(-size // 512) * 512 for size in storages.values())


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
        case = attention_cases.Case(b=8, length=length, h=4, k=k, dtype=dtype, layout=layout, valid=(length,) * 8)
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


# -- on a GPU ----------------------------------------------------------------------------------------------------------------

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


# -- what is stated ----------------------------------------------------------------------------------------------------------


def test_each_function_has_a_stated_workspace():
    functions = {(name, backend) for name, row in backends.TABLE.items() for backend in row if backend != "reference"}
    assert functions == {(name, backend) for backend, stated in STATED.items() for name in stated}


@pytest.mark.parametrize(
    ("name", "backend", "reason"),
    [
        ("similarity_loss_fwd", "reference", "it is plain torch"),
        ("similarity_rows_bwd", "reference", "it is plain torch"),
        ("similarity_rows_bwd", "cpu", "it has no such backend"),
        ("feature_loss_fwd", "cuda", "it has no such backend"),
        ("feature_loss_fwd", "rocm", "there is no such backend"),
        ("softmax", "cpu", "there is no such op"),
    ],
)
def test_unknown(name, backend, reason):
    with pytest.raises(
        UnknownWorkspace, match=re.escape(f"no workspace is stated for {name} on backend {backend}: {reason}")
    ):
        workspace_bytes(name, backend)


def test_an_op_without_a_stated_workspace_is_unknown():
    with (
        mock.patch.dict(backends.TABLE, new_op={"cpu": None}),
        pytest.raises(UnknownWorkspace, match="for new_op on backend cpu: "),
    ):
        workspace_bytes("new_op", "cpu")


def test_cuda_attention_copies_what_is_not_aligned():
    """By csrc/cuda/shaped_attention.cpp: rows that begin at multiples of 16 bytes are read and written in place."""
    joined = torch.empty(4, 50, 3 * 64 + 8, dtype=torch.bfloat16, device="meta")
    inside, shifted = (joined[:, :, i : i + 192].unflatten(2, (3, 64)) for i in (8, 4))
    gains, lse = torch.empty(3, 3, device="meta"), torch.empty(4, 3, 50, device="meta")
    copy = 4 * 50 * 3 * 64 * 2
    assert workspace_bytes("shaped_attention_fwd", "cuda", inside, inside, inside, gains, None, 1.0, False) == 0
    assert workspace_bytes("shaped_attention_fwd", "cuda", inside, shifted, shifted, gains, None, 1.0, False) == 2 * copy
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
