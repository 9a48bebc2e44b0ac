"""The Triton kernels: on a GPU every call against plain torch in float64; there and executed by
tests/ptx, random calls, padding, registration, and the range of G in float16.
"""

import itertools
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import simplclip
from simplclip.calls.similarity import RowStat
from simplclip.common.terms import SWEPT as TERMS
from simplclip.selftest.calls import mlp_call, similarity_call
from simplclip.selftest.compare import run as run_call
from support.devices import DTYPES, needs_triton
from support.kernels.calls import ACTIVATIONS, CALLS, KINDS, case_of, kernels_alone
from support.ops import random_calls
from support.ops.compare import PLAIN, check, check_padding, function_of
from support.ops.small_calls import check_registration

pytestmark = pytest.mark.long


def padding(device: str) -> None:
    every = [*itertools.product(DTYPES, (False, True))]
    with kernels_alone("padding"):
        for dtype, causal in every if device == "cuda" else every[::3]:
            check_padding(dtype, "sdpa", causal, device)


def registration(device: str) -> None:
    for name in ("similarity_loss", "similarity_loss sigmoid", "parallel_mlp"):
        check_registration(name, "triton", device)


def float16_range(device: str) -> None:
    """Checks the factor where one statistic has a gradient, -3 at its end; and for sigmoids."""
    from simplclip.kernels.similarity.blocks import range_factor
    from simplclip.kernels.similarity.gradient import PEAK

    def number(*values) -> torch.Tensor:
        return torch.tensor(values, device=device)

    def check_range(bound: float, what: object, **arguments) -> None:
        half = number(0.0).half()
        factor, unscale = range_factor(
            SimpleNamespace(image=half.expand(2), text=half), **arguments
        )
        assert 2 ** (PEAK.value - 1) < factor * bound <= 2**PEAK.value, what
        assert factor * unscale == 1

    bounds = (
        {
            RowStat.LSE_STUDENT: 6,
            RowStat.MEAN: 6,
            RowStat.DIAGONAL_STUDENT: 3,
            RowStat.PAIR_MATCHING: 21,
        },
        {0: 6, 2: 6},
    )
    scalars = {"scale": number(-2.0), "plane": number(-7.0, 1.0), "HAS_TEACHER": True}
    for side, of_stats in enumerate(bounds):
        for stat, bound in of_stats.items():
            rows, columns = gradients = (
                torch.zeros(len(RowStat), 2, device=device),
                torch.zeros(3, 1, device=device),
            )
            gradients[side][stat, -1] = -3.0
            check_range(bound, (side, stat), grad_rows=rows, grad_columns=columns, **scalars)
    sigmoids = number([4.0, -7.0], [0.0, 0.0], [-10.0, 1.0], [2.0, 5.5], [-3.0, 1.0])
    check_range(3 * 40 + 7 * 5.5, "sigmoids", sigmoids=sigmoids, TERMS=2)


def large_logits(device: str) -> None:
    """As of features that nobody normalised; the rounding error of a logit is about 0.1."""
    call = similarity_call(33, 33, terms=("contrastive", "relational"), width=16, scale=1e6)
    tensors = {name: t.to(device) for name, t in call.typed(torch.float32).items()}

    def results(function, tensors):
        return run_call(function, call, tensors, call.needed(), lambda name, t: torch.ones_like(t))

    with simplclip.backend("triton"):
        out = results(function_of(call), tensors)
    for name, exact in results(PLAIN[call.op], call.tensors).items():
        error = (out[name].cpu() - exact).abs().max()
        assert error <= 1e-5 * exact.abs().max(), name


OTHERS = {
    "padding": padding,
    "registration": registration,
    "float16_range": float16_range,
    "large_logits": large_logits,
}
BLOCK = 25  # random calls in one test; fewer on the CPU
PROVED = [
    pytest.param(str(start), marks=[pytest.mark.prove] if start else [])
    for start in range(0, 500, BLOCK)
]


def run(name: str, device: str) -> None:
    """Runs one of OTHERS, or random calls from a number on; few parts make merges take rounds."""
    from simplclip.kernels.similarity import launch as launching

    few_rows = kernels_alone("chunks" if device == "cpu" else "")
    with few_rows, mock.patch.dict(launching.MERGE, BLOCK_PARTS=2):
        if name in OTHERS:
            OTHERS[name](device)
            return
        seeds = range(int(name), int(name) + (BLOCK if device == "cuda" else 8))
        failed = random_calls.failures(seeds, backend="triton", device=device)
        failed += random_calls.failures(seeds[::5], random_calls.check_nonfinite, "triton", device)
        assert not failed, "\n".join(failed)


def execute(name: str) -> None:
    import ptx

    with ptx.card(86, processors=4) as machine:
        run(name, "cpu")
    machine.forget()


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("name", ["float16_range", "large_logits"])
def test_others_executed(name):
    execute(name)


@pytest.mark.prove
@needs_triton
@pytest.mark.parametrize("name", [*PROVED, "padding", "registration"])
def test_more_calls_executed(name):
    execute(name)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("name", [*PROVED, *OTHERS])
def test_more_calls_on_a_gpu(name):
    run(name, "cuda")


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLS)
def test_calls_on_a_gpu(name, kind, monkeypatch):
    monkeypatch.setattr(
        torch.backends.cuda.matmul, "fp32_precision", "tf32" if kind == "tf32" else "ieee"
    )
    with kernels_alone(name):
        case_of(name, kind, "cuda").check(roundings=True, twice=True)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_calls_on_a_gpu(dtype):
    """Several of a GPU's tiles in each direction, which tests/ptx could not compute in time."""
    one, two = ("contrastive",), ("contrastive", "pair_matching")
    for terms in (one, two, TERMS):
        mode = {"terms": terms}
        for call in (
            similarity_call(700, 1111, 300, **mode, width=200, ids=True, scratch_bytes=1 << 18),
            similarity_call(2048, 2048, **mode, width=256),
        ):
            check(call, dtype, "triton", twice=True, device="cuda")
    for act in ACTIVATIONS:
        for shape in ((5000, 512, 2048, 512), (1001, 200, 777, 200)):
            check(mlp_call(*shape, act=act), dtype, "triton", twice=True, device="cuda")


@needs_triton
def test_every_tile_has_one_program():
    from simplclip.kernels.runtime import splits

    for row_blocks, tiles, slots, least in itertools.product(
        (1, 4, 7, 64, 257), (1, 2, 3, 42, 256), (1, 82, 264), (1, 11, 19)
    ):
        ranges, per_split = splits(row_blocks, tiles, slots, least)
        assert (ranges - 1) * per_split < tiles <= ranges * per_split
        assert ranges >= min(least, tiles)
    # with few rows alone, most multiprocessors would have no work
    assert splits(1, 256, 82)[0] > 60
