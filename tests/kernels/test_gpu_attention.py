"""shaped_attention as users call it, on a CUDA device: the CUDA C++ kernels and the kernels around SDPA against float64."""

import pytest
import torch
from compare import assert_within

import simplclip
from simplclip.ops import backends, shaped_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(backends.cuda_extension is None, reason=str(backends.cuda_extension_error)),
]
TOKENS = (1, 15, 17, 50, 64, 77, 80, 81, 197, 257, 288)
WIDTHS = (16, 32, 64, 80, 96, 128)
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}


@pytest.fixture(autouse=True)
def products_in_tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def leaves(batch, tokens, heads, width):
    g = torch.Generator().manual_seed(tokens * 1000 + width)
    qk = torch.randn(batch, tokens, 2 * heads * width, generator=g)
    x, grad = (torch.randn(batch, tokens, heads * width, generator=g) for _ in range(2))
    return {"qk": qk, "x": x, "gains": 0.7 + torch.rand(3, heads, generator=g)}, grad


def run(backend, given, grad, dtype, heads, **options):
    """Returns values and gradients; q and k are views of one product and v is a view of x, as in a block."""
    moved = {name: t.to("cuda", torch.float64 if dtype == torch.float64 else dtype) for name, t in given.items()}
    moved["gains"] = given["gains"].to("cuda", torch.float64 if dtype == torch.float64 else torch.float32)
    moved = {name: t.requires_grad_() for name, t in moved.items()}
    q, k = moved["qk"].unflatten(-1, (2, heads, -1)).unbind(2)
    with simplclip.backend(backend):
        out = shaped_attention(q, k, moved["x"].unflatten(-1, (heads, -1)), *moved["gains"], **options)
    out.backward(grad.to("cuda", dtype).view_as(out))
    return {"out": out.detach().cpu()} | {f"d {name}": t.grad.cpu() for name, t in moved.items()}


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_values_and_gradients(tokens, kind):
    dtype = DTYPES[kind]
    for width in WIDTHS:
        given, grad = leaves(5, tokens, 3, width)
        given = {name: t if name == "gains" else t.to(dtype).float() for name, t in given.items()}
        grad = grad.to(dtype).float()
        for causal in (False, True):
            for lengths in (None, torch.tensor([0, tokens, 1, tokens // 2, max(tokens - 1, 0)], device="cuda")):
                options = {"causal": causal, "lengths": lengths}
                served = not backends.cuda_extension.shaped_attention_why_not(tokens, width, kind == "tf32")
                kernel, again = (run("cuda" if served else "sdpa", given, grad, dtype, 3, **options) for _ in range(2))
                for name, value in kernel.items() if served else ():
                    assert torch.equal(value, again[name]), f"{name}: a second run gave other values"
                truth = run("reference", given, grad, torch.float64, 3, **options)
                plain = run("reference", given, grad, dtype, 3, **options)
                what = f"{tokens} tokens, width {width}, causal {causal}, lengths {lengths}"
                # Sums over all tokens may nearly cancel: their error is relative to a sum of terms with random signs.
                gains = [{"d gains": result.pop("d gains")} for result in (kernel, plain, truth)]
                assert_within(kernel, plain, truth, "tf32" if kind == "tf32" else dtype, what, least=0.01)
                assert_within(*gains, "tf32" if kind == "tf32" else dtype, what, least=(tokens * width) ** 0.5)


def test_rows_that_are_not_aligned():
    q, k, v = (
        torch.randn(2, 33, 1 + 4 * 32, device="cuda", dtype=torch.bfloat16)[:, :, 1:].unflatten(-1, (4, 32)) for _ in range(3)
    )
    gains = torch.ones(3, 4, device="cuda")
    results = []
    for name in ("cuda", "reference"):
        with simplclip.backend(name):
            results.append(shaped_attention(q, k, v, *gains))
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


def test_registration():
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v = (torch.randn(2, 19, 3, 32, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
        gains = torch.rand(3, 3, device="cuda", requires_grad=True)
        torch.library.opcheck(
            torch.ops.simplclip.shaped_attention_fwd, (q, k, v, gains, None, 0.2, True, "cuda"),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )  # fmt: skip
