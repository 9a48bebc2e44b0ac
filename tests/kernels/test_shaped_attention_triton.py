"""The Triton kernels of shaped_attention against the reference in float64, under the interpreter and on a GPU."""

import itertools
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import interpreter
import pytest
import torch
from interpreter import needs_triton
from tolerance import assert_within

import simplclip
from simplclip import ops
from simplclip.ops import backends
from simplclip.ops.attention import reference as attention_reference
from simplclip.ops.attention.call import AttentionCall, AttentionInto
from simplclip.ops.calls import flat
from simplclip.ops.dtypes import accumulate_dtype

HALVES = (torch.float16, torch.bfloat16)
LENGTHS = (1, 2, 17, 64, 77, 130, 197)
WIDTHS = (32, 64, 80, 20)


@dataclass(frozen=True)
class Case:
    b: int = 1
    length: int = 77
    h: int = 2
    k: int = 32
    causal: bool = False
    valid: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32
    scale: float = 0.3
    beta: float | None = None  # None: drawn
    identity: bool = False  # q = 0, gains 1
    layout: str = "joined"  # views of one [q|k] product; or heads first


def cases() -> dict[str, Case]:
    found = {}
    modes = itertools.product(LENGTHS, ("full", "causal", "lengths", "causal, lengths"))
    for i, (length, mode) in enumerate(modes):
        dtype, k = (torch.float32, *HALVES)[i % 3], WIDTHS[(i + i // 4) % 4]
        case = Case(length=length, k=k, causal="causal" in mode, dtype=dtype, h=1 if length > 100 else 2)
        if "lengths" in mode:
            case = replace(case, valid=(length, 0, max(1, length * 2 // 3)), b=3, h=1 if length > 60 else 2)
        found[f"{length} {mode}, K={k}, {dtype}"] = case
    for causal in (False, True):
        case = Case(causal=causal, length=70, k=20)
        name = "causal" if causal else "full"
        found |= {
            f"{name}, beta 0": replace(case, beta=0.0),
            f"{name}, beta 0, bfloat16": replace(case, beta=0.0, dtype=torch.bfloat16),
            f"{name}, scale -2": replace(case, scale=-2.0),
            f"{name}, scale 0": replace(case, scale=0.0),
            f"{name}, large logits": replace(case, scale=30.0),
            f"{name}, heads first": replace(case, layout="heads first", b=2, h=3, valid=(40, 70)),
            f"{name}, identity": replace(case, identity=True, dtype=torch.bfloat16),
        }
    return found


def large_cases() -> dict[str, Case]:
    """More than the interpreter can do in a test's time."""
    found = {}
    for length, k, causal, dtype in itertools.product(
        (257, 1000, 2048), (64, 80, 128), (False, True), (torch.float32, *HALVES)
    ):
        valid = (length, length // 3, 0)
        found[f"{length}, K={k}, {causal=}, {dtype}"] = Case(3, length, 4, k, causal, valid, dtype, k**-0.5)
    for dtype in HALVES:
        found[f"K=256, {dtype}"] = Case(2, 300, 2, 256, True, None, dtype, 0.1)
    return found


def tensors(case: Case, device: str) -> tuple[list, list, torch.Tensor, torch.Tensor | None]:
    """q, k, v and grad; buffers for dq, dk, dv as NaN; gains in float64; lengths."""
    g = torch.Generator().manual_seed(case.length)
    b, length, h, k = case.b, case.length, case.h, case.k

    def view(count: int, source) -> list[torch.Tensor]:
        """`count` tensors [B, L, H, K] side by side in one buffer."""
        if case.layout == "joined":
            buffer = source(b, length, count * h * k + 16).to(device, case.dtype)[:, :, 8:-8]
            return [t.unflatten(2, (h, k)) for t in buffer.chunk(count, 2)]
        return list(source(count, b, h, length, k).to(device, case.dtype).transpose(2, 3))

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def nothing(*shape):
        return torch.full(shape, torch.nan)

    q, keys = view(2, normal)
    (v,), (grad,) = view(1, normal), view(1, normal)
    gains = normal(3, h)
    if case.identity:
        gains.fill_(1.0)
        q.zero_()
    if case.beta is not None:
        gains[1] = case.beta
    lengths = None if case.valid is None else torch.tensor(case.valid, dtype=torch.int32, device=device)
    return [q, keys, v, grad], [*view(2, nothing), *view(1, nothing)], gains.to(device), lengths


def of_reference(inputs: list, gains, lengths, case: Case, dtype: torch.dtype) -> dict:
    q, k, v, grad = (t.to(dtype) for t in inputs)
    gains = gains.to(accumulate_dtype(dtype))
    call = AttentionCall(q, k, v, gains, lengths, case.scale, case.causal)
    out, lse = attention_reference.shaped_attention_fwd(call)
    d = [torch.empty_like(t) for t in (q, k, v)]
    d_gains = attention_reference.shaped_attention_bwd(AttentionInto(*flat(call), grad, lse, *d))
    return named(out, lse, *d, d_gains)


def named(*results) -> dict:
    return {name: t.cpu() for name, t in zip(("out", "lse", "dq", "dk", "dv", "d_gains"), results)}


def run(case: Case, device: str) -> None:
    from simplclip.kernels.attention import op as kernels

    inputs, d, gains, lengths = tensors(case, device)
    truth = of_reference(inputs, gains, lengths, case, torch.float64)
    plain = of_reference(inputs, gains, lengths, case, case.dtype)
    for i, valid in enumerate(case.valid or ()):
        for t in inputs:
            t[i, valid:] = torch.nan
    q, k, v, grad = inputs
    gains = gains.float()
    with mock.patch.object(kernels, "SUMS", 2 if device == "cpu" else kernels.SUMS):  # few blocks, yet several rounds
        call = AttentionCall(q, k, v, gains, lengths, case.scale, case.causal)
        out, lse = kernels.shaped_attention_fwd(call)
    d_gains = kernels.shaped_attention_bwd(AttentionInto(*flat(call), grad, lse, *d))
    assert out.is_contiguous()
    assert out.dtype == case.dtype
    found = named(out, lse, *d, d_gains)
    alone = case.length == 1  # the softmax of one key has no gradient
    assert_within(found, plain, truth, case.dtype, least=float(alone))
    for i, valid in enumerate(case.valid or ()):
        for name, t in zip(("out", "dq", "dk", "dv"), (out, *d)):
            assert not t[i, valid:].any(), f"{name}: not 0 in padded tokens"
    if case.identity:
        assert torch.equal(out, v), "attention does not start as the identity"


def end_to_end(device: str) -> None:
    """Values and gradients through the public function; the gradient comes expanded."""
    g = torch.Generator().manual_seed(3)
    shape = (2, 50, 3, 20)
    leaves = [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(3)]
    leaves += [torch.randn(3, generator=g, dtype=torch.float64) for _ in range(3)]
    lengths = torch.tensor([50, 31], device=device)

    def call(dtype, backend):
        args = [t.to(device, dtype, copy=True).requires_grad_() for t in leaves]
        with simplclip.backend(backend):
            out = ops.shaped_attention(*args, causal=True, lengths=lengths)
        out.sum().backward()
        return {"out": out.detach().cpu()} | {str(i): t.grad.cpu() for i, t in enumerate(args)}

    found, plain, truth = call(torch.float32, "triton"), call(torch.float32, "reference"), call(torch.float64, "reference")
    assert_within(found, plain, truth, torch.float32)


def registration(device: str) -> None:
    """Shapes, dtypes and strides are those that the fake functions promise."""
    inputs, _, gains, lengths = tensors(replace(Case(), b=2, length=9, valid=(9, 4)), device)
    q, k, v, grad = inputs
    gains = gains.float()
    lse = torch.zeros(2, 2, 9, device=device)
    checks = {"rtol": 1e-4, "atol": 1e-5, "test_utils": ("test_schema", "test_faketensor")}
    call = (q, k, v, gains, lengths, 0.3, True)
    torch.library.opcheck(torch.ops.simplclip.shaped_attention_fwd, (*call, "triton"), **checks)
    torch.library.opcheck(torch.ops.simplclip.shaped_attention_bwd, (*call, grad, lse, "triton"), **checks)


def nothing(device: str) -> None:
    """No sequences, no tokens."""
    from simplclip.kernels.attention import op as kernels

    for shape in ((0, 5, 2, 16), (3, 0, 2, 16)):
        q, gains = torch.empty(shape, device=device), torch.ones(3, 2, device=device)
        call = AttentionCall(q, q, q, gains, None, 1.0, False)
        out, lse = kernels.shaped_attention_fwd(call)
        assert (out.shape, lse.shape) == (q.shape, (shape[0], 2, shape[1]))
        d_gains = kernels.shaped_attention_bwd(AttentionInto(*flat(call), q, lse, out, out, out))
        assert torch.equal(d_gains, torch.zeros_like(gains))


EXTRA = {"end to end": end_to_end, "registration": registration, "nothing": nothing}
NAMES = [*cases(), *EXTRA]
SCRIPT = "kernels/test_shaped_attention_triton.py"


def run_named(name: str, device: str) -> None:
    interpreter.poisoned(EXTRA[name] if name in EXTRA else partial(run, {**cases(), **large_cases()}[name]), device)


test_interpreted, test_on_gpu = interpreter.make_tests(NAMES, large_cases(), run_named)


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "width", "expected"),
    [
        (torch.bfloat16, 256, None),
        (torch.bfloat16, 257, "heads of at most 256 in torch.bfloat16, not 257"),
        (torch.float32, 128, None),
        (torch.float32, 129, "heads of at most 128 in torch.float32, not 129"),
    ],
)
def test_widths_that_are_served(dtype, width, expected):
    for op in ("shaped_attention_fwd", "shaped_attention_bwd"):
        reason = backends.why_not(op, "triton", "cuda", dtype, width=width, length=77)
        assert reason is expected if expected is None else expected in reason


if __name__ == "__main__":
    interpreter.main(NAMES, run_named)
