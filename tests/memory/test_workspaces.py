"""Stated workspaces against what torch's allocator gives out in every call that the ops make on a CPU."""

import contextlib
import itertools
from unittest import mock

import pytest
import torch
from devices import DTYPES, needs_cpu_kernels
from similarity import FEATURES, TEACHER, make_inputs
from torch.utils._pytree import tree_leaves

from simplclip.memory.measure import cpu_peak_bytes
from simplclip.memory.workspaces import UnknownWorkspace, packing_bytes, workspace_bytes
from simplclip.ops import backends, feature_loss, parallel_mlp, shaped_attention, similarity_loss, simplified_block
from simplclip.ops.mlp.call import HiddenGradient
from simplclip.ops.similarity.call import TERMS

SCALARS = 64  # bytes, of results that come after the peak
# What oneDNN packs is fitted to AVX512-BF16; of AMX, and of float16 where AVX512-FP16 multiplies it, only a bound is known.
UNFITTED = (4 << 20) * torch.cpu._is_amx_tile_supported()
NATIVE = {torch.bfloat16} | ({torch.float16} if torch.ops.mkldnn._is_mkldnn_fp16_supported() else set())


def check(stated: int, measured: int, slack: int, what: str) -> None:
    assert abs(stated - measured) <= slack, f"{what}: stated {stated}, measured {measured}"


def tensors_of(tree) -> list:
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def storage_bytes(tree, grain: int = 1) -> int:
    """Bytes of the tensors' memory, that of each allocation rounded up to the grain."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_of(tree)}
    return sum(-(-size // grain) * grain for size in storages.values())


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
            halves = any(t.dtype in NATIVE for t in tensors_of(args))
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
    {"scratch_bytes": 1 << 19, "store_bytes": 1 << 19},  # some stored of one plane
    {"store_bytes": 1 << 19},  # and the others in one chunk
)


def run_similarity(case: dict, n: int, m: int, width: int, dtype: torch.dtype, frozen: tuple = (), **options) -> None:
    case = dict(case)
    build = {k: case.pop(k) for k in ("terms", "plane", "teacher_width") if k in case}
    leaves, built = make_inputs(n, m, (m - n) // 2, ids=n % 2 == 1, width=width, **build)
    args = {k: v.to(dtype if k in FEATURES else torch.float32) for k, v in leaves.items()}
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
        for (n, m, width), budgets in itertools.product(((70, 97, 48), (401, 803, 128)), BUDGETS):
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
            run_similarity(SIMILARITY[name], 401, 803, 128, dtype, frozen, **budgets)
    assert len(called) == 24


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
            c = c // 8 if dtype == torch.float16 else c  # torch's products of float16 are slow
            x, w1, b1, w2, b2 = leaves_of(dtype, (t, c), (f, c), (f,), (c, f), (c,))
            parallel_mlp(x, w1, b1, w2, b2).sum().backward()
            parallel_mlp(x, w1, None, w2.detach(), None, act="relu").sum().backward()  # no gradient of the second weight
            with torch.no_grad():
                parallel_mlp(x, w1, b1, w2, b2)
        of_nothing = torch.empty(0, c, dtype=dtype), torch.empty(0, f, dtype=dtype), w2.detach(), "gelu", True
        backends.TABLE["parallel_mlp_bwd"]["cpu"].function(HiddenGradient(*of_nothing))
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


def test_a_function_without_a_workspace_is_an_error():
    with pytest.raises(UnknownWorkspace, match="no workspace is stated for parallel_mlp_bwd on backend cuda"):
        workspace_bytes("parallel_mlp_bwd", "cuda", *[torch.empty(8, 8)] * 3, "gelu", True)


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
    args = [inside, inside, inside, gains, None, 1.0, False, shifted, lse, inside, shifted, inside]
    assert workspace_bytes("shaped_attention_bwd", "cuda", *args) == 2 * copy + 512
