"""The ops on their Triton kernels against plain torch in float64, executed by tests/ptx and on a GPU."""

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import pytest
import random_calls
import torch
from calls import TERMS, Call, attention_call, mlp_call, of_lengths, similarity_call
from compare import check, check_padding
from devices import DTYPES, needs_triton
from small_calls import check_registration

from simplclip.ops.attention import with_library_attention
from simplclip.ops.similarity.call import RowStat

MODES = [{"terms": TERMS[:1]}, {"terms": TERMS[:2]}, {"terms": TERMS[:2], "plane": "hadamard"}, {"terms": TERMS}]


def similarity(full: bool) -> Iterator[tuple[Call, torch.dtype, dict]]:
    n = 130 if full else 97
    for mode in MODES if full else MODES[2:]:
        yield similarity_call(n, n + 1, 1, **mode, scratch_bytes=0), torch.float32, {}  # three chunks, or two
        yield similarity_call(65, 65, **mode, ids=True, divergence="cross_entropy"), torch.bfloat16, {}
    for scale in (1000.0, -50.0):
        yield similarity_call(*((65, 65) if full else (33, 33)), **MODES[-1], scale=scale), torch.float32, {}
    yield similarity_call(65, 65, **MODES[-1]), torch.float16, {"size": 1e-3}


def blocks(full: bool) -> Iterator[tuple[Call, torch.dtype, dict]]:
    """Yields sides around a block's, 128 here."""
    for n, m in ((1, 1), (127, 128), (129, 129), *([(257, 258)] if full else []), (128, 129)):
        for dtype, symmetric in ((torch.float32, True), (torch.bfloat16, False))[: 2 - m % 2]:
            options = {"scale": 20.0, "symmetric": symmetric, "scratch_bytes": 0}
            yield similarity_call(n, m, (m - n) // 2, terms=TERMS[:1], **options), dtype, {}
    call = similarity_call(200, 200, terms=TERMS[:1], scratch_bytes=0)  # rows and columns with very different statistics
    call.tensors["image"][::3] *= 30
    call.tensors["text"][::5] *= 1e-3
    call.tensors["text"][5::7] *= 10
    yield call, torch.float32, {}


def mlp(full: bool) -> Iterator[tuple[Call, torch.dtype, dict]]:
    for dtype in DTYPES:  # several chunks of rows, the last one partial
        yield mlp_call(300 if full else 150, 20, 70, 20, act="gelu_tanh"), dtype, {}
    for act in ("gelu", "gelu_tanh", "quickgelu", "silu"):
        call = mlp_call(70, 20, 65, 40, act=act)
        call.tensors["x"] *= 15  # puts the hidden layer between -100 and 100
        yield call, torch.float32, {}


def around_sdpa(full: bool) -> Iterator[tuple[Call, torch.dtype, dict]]:
    """Yields several blocks of tokens, the last one partial; q, k and v contiguous, and with gaps between rows."""
    apart = {"layouts": dict.fromkeys(("q", "k", "v", "grad out"), "rows_apart")}
    shapes = (
        itertools.product(((81, 64), (197, 48), (257, 64)), (False, True)) if full else [((81, 64), False), ((145, 48), True)]
    )
    for (tokens, width), causal in shapes:
        call = of_lengths(attention_call(3, tokens, 2, width, causal=causal), [tokens // 2, 0, tokens])
        yield call, torch.float32, {**apart, "twice": full and tokens == 81}
        yield attention_call(1, tokens, 2, width, causal=causal), torch.bfloat16, {"roundings": True}
    for dtype, scale in ((torch.float16, 1.0), (torch.float32, -2.0), (torch.float32, 0.0)):
        yield attention_call(2, 130, 1, 20, causal=scale < 0, scale=scale), dtype, {"roundings": True}


def attention(device: str) -> None:
    """Checks the terms around torch's attention by this library's kernels alone."""
    plain = {"_write_terms": None, "_gradients_without_softmax": None}
    with mock.patch.multiple(with_library_attention, **plain):
        for call, dtype, options in around_sdpa(full=device == "cuda"):
            check(call, dtype, "sdpa", device=device, **options)
        every = [*itertools.product(DTYPES, (False, True))]
        for dtype, causal in every if device == "cuda" else every[::3]:
            check_padding(dtype, "sdpa", causal, device)


def large(full: bool) -> Iterator[tuple[Call, torch.dtype, dict]]:
    """Yields calls with several of a GPU's tiles in each direction, which tests/ptx could not compute in time."""
    for dtype in DTYPES:
        for mode in MODES:
            yield similarity_call(700, 1111, 300, **mode, width=200, ids=True, scratch_bytes=1 << 18), dtype, {}
            yield similarity_call(2048, 2048, **mode, width=256), dtype, {}
        for act in ("gelu", "gelu_tanh", "quickgelu", "relu", "silu"):
            yield mlp_call(5000, 512, 2048, 512, act=act), dtype, {}
            yield mlp_call(1001, 200, 777, 200, act=act), dtype, {}


def registration(device: str) -> None:
    for name in ("similarity_loss", "similarity_loss sigmoid", "parallel_mlp"):
        check_registration(name, "triton", device)


def float16_range(device: str) -> None:
    """Checks the factor where a single statistic has a gradient, -3 in its last row or column; and for sigmoid terms."""
    from simplclip.kernels.similarity.backward import PEAK
    from simplclip.kernels.similarity.op import range_factor

    def number(*values) -> torch.Tensor:
        return torch.tensor(values, device=device)

    def check_range(bound: float, what: object, **arguments) -> None:
        half = number(0.0).half()
        factor, unscale = range_factor(SimpleNamespace(image=half.expand(2), text=half), **arguments)
        assert 2 ** (PEAK.value - 1) < factor * bound <= 2**PEAK.value, what
        assert factor * unscale == 1

    bounds = {RowStat.LSE_STUDENT: 6, RowStat.MEAN: 6, RowStat.DIAGONAL_STUDENT: 3, RowStat.PAIR_MATCHING: 21}, {0: 6, 2: 6}
    scalars = {"scale": number(-2.0), "plane": number(-7.0, 1.0), "HAS_TEACHER": True}
    for side, of_stats in enumerate(bounds):
        for stat, bound in of_stats.items():
            rows, columns = gradients = torch.zeros(len(RowStat), 2, device=device), torch.zeros(3, 1, device=device)
            gradients[side][stat, -1] = -3.0
            check_range(bound, (side, stat), grad_rows=rows, grad_columns=columns, **scalars)
    sigmoids = number([4.0, -7.0], [0.0, 0.0], [-10.0, 1.0], [2.0, 5.5], [-3.0, 1.0])
    check_range(3 * 40 + 7 * 5.5, "sigmoids", sigmoids=sigmoids, TERMS=2)


CALLS = {"similarity_loss": similarity, "blocks": blocks, "parallel_mlp": mlp, "large": large}
OTHERS = {"attention": attention, "registration": registration, "float16_range": float16_range}
BLOCK = 25  # random calls in one test; fewer on the CPU
PROVED = [pytest.param(str(start), marks=[pytest.mark.prove] if start else []) for start in range(0, 500, BLOCK)]


def run(name: str, device: str) -> None:
    """Runs cases with few parts and sums at a time, so that a few blocks take several rounds."""
    from simplclip.kernels.mlp import op as mlp_op
    from simplclip.kernels.similarity import op as similarity_op

    less = mock.patch.object(mlp_op, "SCRATCH_BYTES", 0 if device == "cpu" else mlp_op.SCRATCH_BYTES)  # 64 rows at a time
    with less, mock.patch.dict(similarity_op.MERGE, BLOCK_PARTS=2):
        if name in OTHERS:
            OTHERS[name](device)
        elif name in CALLS:
            for number, (call, dtype, options) in enumerate(CALLS[name](full=device == "cuda")):
                twice = device == "cuda" or number == 0
                check(call, dtype, "triton", twice=twice, device=device, **options)
        else:
            seeds = range(int(name), int(name) + (BLOCK if device == "cuda" else 8))
            failed = random_calls.failures(seeds, backend="triton", device=device)
            failed += random_calls.failures(seeds[::5], random_calls.check_nonfinite, "triton", device)
            assert not failed, "\n".join(failed)


def execute(name: str) -> None:
    import ptx

    with ptx.card(86, processors=4):
        run(name, "cpu")


@pytest.mark.slow
@needs_triton
def test_float16_range_executed():
    execute("float16_range")


@pytest.mark.prove
@needs_triton
@pytest.mark.parametrize("name", [*PROVED, *list(CALLS)[:-1], "attention", "registration"])
def test_more_calls_executed(name):
    execute(name)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("name", [*PROVED, *CALLS, *OTHERS])
def test_triton_kernels_on_a_gpu(name):
    run(name, "cuda")


@needs_triton
def test_every_tile_has_one_program():
    from simplclip.kernels.launch import splits

    for row_blocks, tiles, slots in itertools.product((1, 2, 7, 64, 257), (1, 2, 3, 41, 256), (1, 82, 264)):
        ranges, per_split = splits(row_blocks, tiles, slots)
        assert (ranges - 1) * per_split < tiles <= ranges * per_split
    assert splits(1, 256, 82)[0] > 60  # with few rows alone, most multiprocessors would have no work
