"""The Triton kernels of parallel_mlp against the reference in float64, under the interpreter and on a GPU."""

import itertools
from dataclasses import dataclass, replace
from functools import partial

import interpreter
import torch
from tolerance import assert_within

import simplclip
from simplclip import ops
from simplclip.ops.mlp import reference as mlp_reference
from simplclip.ops.mlp.call import HiddenCall, HiddenGradient
from simplclip.ops.mlp.reference import ACTIVATIONS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    t: int = 70
    c: int = 40
    f: int = 65
    act: str = "gelu"
    dtype: torch.dtype = torch.float32
    bias: bool = True
    accumulate: bool = False
    size: float = 1.0  # of h


def cases() -> dict[str, Case]:
    found = {}
    for i, (act, dtype) in enumerate(itertools.product(ACTIVATIONS, DTYPES)):
        found[f"{act}, {dtype}"] = Case(act=act, dtype=dtype, bias=i % 2 == 0, accumulate=i % 3 > 0)
    for act in ACTIVATIONS:
        found[f"{act}, from -100 to 100"] = Case(act=act, size=30.0)
    sizes = ((1, 1, 1), (2, 24, 40), (32, 64, 128), (33, 65, 16), (130, 17, 131))
    for i, (t, c, f) in enumerate(sizes):
        case = Case(t, c, f, "gelu_tanh", DTYPES[i % 3])
        found[f"{t} x {c} x {f}"] = case
        found[f"{t} x {c} x {f}, added"] = replace(case, accumulate=True, bias=False)
    for dtype in DTYPES:
        found[f"two ranges of tokens, {dtype}"] = Case(t=300, c=20, f=70, dtype=dtype)
    return found


def large_cases() -> dict[str, Case]:
    """More than the interpreter can do in a test's time."""
    found = {}
    for act, dtype, accumulate in itertools.product(ACTIVATIONS, DTYPES, (False, True)):
        found[f"{act}, {dtype}, {accumulate=}"] = Case(5000, 512, 2048, act, dtype, accumulate=accumulate)
        found[f"{act}, {dtype}, {accumulate=}, odd"] = Case(1001, 200, 777, act, dtype, accumulate=accumulate)
    return found


def tensors(case: Case, device: str) -> tuple[torch.Tensor, ...]:
    """h, weight, bias, out, grad; the rows of h, out and grad are parts of longer ones."""
    g = torch.Generator().manual_seed(case.t)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(device)

    h = normal(case.t, case.f + 16) * case.size
    weight, bias = normal(case.c, case.f) * case.f**-0.5, normal(case.c)
    out, grad = normal(case.t, case.c + 8), normal(case.t, case.c + 8)
    h, weight, bias, out, grad = (t.to(case.dtype) for t in (h, weight, bias, out, grad))
    return h[:, 8:-8], weight, bias if case.bias else None, out[:, 3:-5], grad[:, :-8]


def results_of(functions, inputs: tuple, case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Out, dh and d_weight; h and out are strided copies, out holds NaN if it is not added to."""
    fwd, bwd = functions
    copies = [None if t is None else t.to(dtype) for t in inputs]
    h, weight, bias, out, grad = copies
    h, out = (torch.cat([torch.full_like(t, torch.nan), t], 1)[:, t.shape[1] :] for t in (h, out))
    if not case.accumulate:
        out.fill_(torch.nan)
    fwd(HiddenCall(h, weight, bias, case.act, out, case.accumulate))
    d_weight = bwd(HiddenGradient(grad, h, weight, case.act, True))
    assert d_weight.dtype == dtype
    return {"out": out.cpu(), "dh": h.cpu(), "d_weight": d_weight.cpu()}


def run(case: Case, device: str) -> None:
    from simplclip.kernels.mlp.op import parallel_mlp_bwd, parallel_mlp_fwd

    inputs = tensors(case, device)
    plain = mlp_reference.parallel_mlp_fwd, mlp_reference.parallel_mlp_bwd
    found = results_of((parallel_mlp_fwd, parallel_mlp_bwd), inputs, case, case.dtype)
    assert_within(
        found, results_of(plain, inputs, case, case.dtype), results_of(plain, inputs, case, torch.float64), case.dtype
    )  # fmt: skip


def without_the_weight(device: str) -> None:
    """No gradient of the weight; one that comes expanded and a weight that comes transposed are read right."""
    from simplclip.kernels.mlp.op import parallel_mlp_bwd, parallel_mlp_fwd

    h, weight, bias, out, grad = tensors(Case(), device)
    weight = weight.T.contiguous().T
    grad = torch.tensor(2.0, device=device).expand(grad.shape)
    expected_h, expected_out = h.clone(), out.clone()
    parallel_mlp_fwd(HiddenCall(h, weight, bias, "silu", out, False))
    mlp_reference.parallel_mlp_fwd(HiddenCall(expected_h, weight, bias, "silu", expected_out, False))
    torch.testing.assert_close(out, expected_out, rtol=1e-5, atol=1e-5)
    d_weight = parallel_mlp_bwd(HiddenGradient(grad, h, weight, "silu", False))
    mlp_reference.parallel_mlp_bwd(HiddenGradient(grad, expected_h, weight, "silu", False))
    assert d_weight.shape == (0, weight.shape[1])
    torch.testing.assert_close(h, expected_h, rtol=1e-5, atol=1e-5)


def no_tokens(device: str) -> None:
    from simplclip.kernels.mlp.op import parallel_mlp_bwd, parallel_mlp_fwd

    h, weight, bias, out, grad = tensors(Case(t=0), device)
    parallel_mlp_fwd(HiddenCall(h, weight, bias, "gelu", out, True))
    assert torch.equal(parallel_mlp_bwd(HiddenGradient(grad, h, weight, "gelu", True)), torch.zeros_like(weight))


def end_to_end(device: str) -> None:
    """Values and gradients through the public function; the gradient comes expanded."""
    g = torch.Generator().manual_seed(3)
    shapes = (2, 20, 12), (40, 12), (40,), (24, 40), (24,)
    leaves = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]

    def call(dtype, backend):
        args = [t.to(device, dtype, copy=True).requires_grad_() for t in leaves]
        with simplclip.backend(backend):
            out = ops.parallel_mlp(*args, act="quickgelu")
        out.sum().backward()
        return {"out": out.detach().cpu()} | {str(i): t.grad.cpu() for i, t in enumerate(args)}

    found, plain, truth = call(torch.float32, "triton"), call(torch.float32, "reference"), call(torch.float64, "reference")
    assert_within(found, plain, truth, torch.float32)


def ranges_of_tokens(device: str) -> None:
    """The cases of two ranges have two under the interpreter."""
    from simplclip.kernels import tuning
    from simplclip.kernels.launch import splits
    from simplclip.kernels.mlp.op import TILE

    tile = tuning.lookup("parallel_mlp_weight", 1, "ieee", tuning.INTERPRETER)
    blocks = -(-20 // tile.block_m) * -(-70 // tile.block_n)
    assert splits(blocks, -(-300 // (TILE * tile.block_k)), 4 * tile.blocks) == (2, 1)


EXTRA = {
    "without the weight": without_the_weight,
    "no tokens": no_tokens,
    "ranges of tokens": ranges_of_tokens,
    "end to end": end_to_end,
}
NAMES = [*cases(), *EXTRA]
SCRIPT = "kernels/test_parallel_mlp_triton.py"


def run_named(name: str, device: str) -> None:
    interpreter.poisoned(EXTRA[name] if name in EXTRA else partial(run, {**cases(), **large_cases()}[name]), device)


test_interpreted, test_on_gpu = interpreter.make_tests(NAMES, large_cases(), run_named)


if __name__ == "__main__":
    interpreter.main(NAMES, run_named)
