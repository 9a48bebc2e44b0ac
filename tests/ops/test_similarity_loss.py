"""Cases beyond random calls of similarity_loss: several chunks, logits that lie far apart, pairs
without negatives.
"""

import functools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import simplclip
from simplclip.calls.similarity import SigmoidCall
from simplclip.common.terms import SWEPT as TERMS
from simplclip.ops import similarity_loss
from simplclip.ops.similarity.reference import empty_sigmoids, similarity_sigmoid
from simplclip.selftest.calls import similarity_call
from simplclip.selftest.compare import outputs_of, run
from support.devices import BACKENDS, DTYPES, needs_cpu_kernels
from support.ops import plain
from support.ops.calls import recorded_calls
from support.ops.compare import PLAIN, check, function_of
from support.ops.small_calls import SIGMOIDS


def one(name, result):
    return torch.ones_like(result)


def of_ones(call, backend, need=None):
    """Returns results in float32 and the gradients of their sum."""
    tensors = call.typed(torch.float32)
    with simplclip.backend(backend):
        return run(function_of(call), call, tensors, need or call.needed(), one)


@pytest.mark.slow
@needs_cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_and_stored_rows_change_nothing(dtype):
    """One chunk or several, the last one partial; stored rows may end between chunks."""
    row = 310 * (4 if dtype == torch.float16 else dtype.itemsize)
    rows = ((0, 0), (64, 0), (128, 0), (128, 64), (128, 192))
    budgets = [(scratch * row, store * row) for scratch, store in rows] + [(1 << 20, 1 << 20)]
    for scratch, store in budgets if dtype == torch.float32 else budgets[1::2]:
        options = {"scratch_bytes": scratch, "store_bytes": store, "teacher_width": 20}
        check(
            similarity_call(300, 310, 7, terms=TERMS, ids=True, **options),
            dtype,
            "cpu",
        )


@needs_cpu_kernels
@pytest.mark.parametrize("n", [4, 40, 100])
@pytest.mark.parametrize("which", ["", "teacher_"])
def test_columns_far_below_their_strip_are_summed_afresh(which, n):
    """One logit of 300, of the student or the teacher, lets every exponential of the other columns
    underflow.
    """
    call = similarity_call(n, n, terms=TERMS, width=n, scale=1.0)
    # makes the matrix equal to image
    call.tensors[f"{which}text"] = torch.eye(n, dtype=torch.float64)
    image = torch.rand(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    image[0, 1] = 300
    call.tensors[f"{which}image"] = image
    check(call, torch.float32, "cpu")


@needs_cpu_kernels
@pytest.mark.parametrize("scale", [0.01, 100.0, 700.0, -50.0])
def test_wide_logits(scale):
    """Statistics lie too far apart for one exponential to serve rows and columns, and columns
    underflow.
    """
    # a small KL is a difference of two large numbers
    divergence = "kl" if scale > 1 else "cross_entropy"
    call = similarity_call(150, 150, terms=TERMS, scale=scale, divergence=divergence)
    call.tensors["image"][::3] *= 3  # unnormalised features are allowed
    call.tensors["teacher_image"][::4] *= 3
    check(call, torch.float32, "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e5, 1e8, 1e12])
def test_logits_of_any_size_have_the_gradients_of_plain_torch(scale, backend):
    """As features that nobody normalised have: a logit's rounding error is then far above 1."""
    call = similarity_call(65, 65, terms=("contrastive", "relational"), scale=scale)
    out = of_ones(call, backend)
    exact = run(PLAIN[call.op], call, call.tensors, call.needed(), one)
    for name, value in exact.items():
        error = (out[name] - value).abs().max()
        assert error <= 1e-5 * value.abs().max(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 20])
def test_all_ids_equal_leaves_no_negatives(n, backend):
    call = similarity_call(n, n, terms=TERMS)
    call.tensors["ids"] = torch.zeros(n, dtype=torch.int64)
    out = of_ones(call, backend)
    assert out["contrastive"] == out["relational"] == 0
    assert [name for name, value in out.items() if not value.isfinite().all()] == []


def test_the_reference_keeps_the_small_gradients_of_float16():
    """A device without kernels gets float16 features here; 1e-9 is 0 in float16."""
    image, text = (torch.eye(4, dtype=torch.float16) for _ in range(2))
    numbers = torch.tensor([[1.0], [0.0], [1e-9], [1e-9], [1.0]])
    call = SigmoidCall(image, text, numbers, None, None, 0, 4, True, True, True)
    results = similarity_sigmoid(call)
    assert [t.dtype for t in results] == [t.dtype for t in empty_sigmoids(call)]
    assert results[1].all()
    assert results[2].all()


def test_numbers_of_numpy_and_fractions_are_scales():
    image, text = torch.randn(4, 8), torch.randn(4, 8)
    terms = {"terms": ("sigmoid",), "logit_bias": np.float32(-2.0)}
    expected = similarity_loss(image, text, 10.0, terms=("sigmoid",), logit_bias=-2.0)
    for kind in (np.float32, np.float64, np.float16, np.int64, np.array, Fraction):
        assert similarity_loss(image, text, kind(10), **terms) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_student_equal_to_its_teacher_has_no_divergence(backend):
    call = similarity_call(40, 40, terms=("relational",))
    call.tensors |= {f"teacher_{name}": call.tensors[name] for name in ("image", "text")}
    call.tensors["teacher_scale"] = call.tensors["logit_scale"]
    out = of_ones(call, backend)
    assert out["relational"].abs() < 1e-6
    assert out["d_image"].abs().max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "scratch"), [(8, None), (80, 0)])  # one chunk, or two
@pytest.mark.parametrize("scale", [100.0, 300.0])
def test_a_small_kl_has_the_documented_error(scale, n, scratch, backend):
    """Its summands are as large as the teacher's logits, whose cosines are about 0.5."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        tensors = [
            F.normalize(torch.randn(n, 16, generator=generator) + 1, dim=1) for _ in range(4)
        ]
        teacher = dict(zip(("teacher_image", "teacher_text"), tensors[2:]), teacher_scale=scale)
        with simplclip.backend(backend):
            kl = similarity_loss(
                *tensors[:2], 1.0, terms=("relational",), **teacher, scratch_bytes=scratch
            )
        image, text, *wide = (t.double() for t in tensors)
        teacher |= zip(("teacher_image", "teacher_text"), wide)
        exact = plain.similarity_loss(image, text, 1.0, terms=("relational",), **teacher)
        largest = scale * (tensors[2] @ tensors[3].T).abs().max()
        assert abs(kl["relational"] - exact["relational"]) < 2**-23 * largest


OF_LARGE = ["logit_scale", "plane_weight", "plane_bias"]


@functools.cache
def large(term):
    """Returns a call of 2048² pairs, and its gradients of OF_LARGE in float64."""
    call = similarity_call(2048, 2048, terms=(term, "pair_matching"), width=32)
    return call, run(PLAIN[call.op], call, call.typed(torch.float64), OF_LARGE, one)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("term", ["contrastive", "sigmoid"])
def test_gradients_of_scale_and_plane_have_the_digits_of_float32(term, backend):
    """They are sums over N² pairs."""
    call, exact = large(term)
    got = of_ones(call, backend, OF_LARGE)
    for name in (f"d_{name}" for name in OF_LARGE):
        torch.testing.assert_close(got[name].double(), exact[name], rtol=2e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("terms", [TERMS[:1], TERMS[1:2], TERMS[2:3], TERMS[1::-1]])
@pytest.mark.parametrize("bias", [-10.0, torch.inf])
def test_a_bias_that_changes_nothing_has_a_gradient_of_zero(bias, terms, backend):
    call = similarity_call(4, 4, terms=terms)
    without = of_ones(call, backend)
    call.tensors["logit_bias"] = torch.tensor(bias)
    out = of_ones(call, backend)
    assert out.pop("d_logit_bias") == 0
    assert all(torch.equal(value, without[name]) for name, value in out.items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_int32_ids_equal_int64_ids(backend):
    call = similarity_call(4, 4, terms=TERMS, scale=1.0)
    without = of_ones(call, backend)
    call.tensors["ids"] = torch.tensor([0, 0, 1, 2])
    wide = of_ones(call, backend)
    call.tensors["ids"] = call.tensors["ids"].int()
    narrow = of_ones(call, backend)
    for term in call.options["terms"]:
        assert narrow[term] == wide[term] != without[term]


SOFTMAX, SIGMOID = "similarity_loss_fwd", "similarity_sigmoid"


@pytest.mark.parametrize(
    ("asked", "sweeps"),
    [
        ({"terms": ("contrastive", "pair_matching")}, [SOFTMAX]),
        ({"terms": ("relational", "pair_matching")}, [SOFTMAX]),
        ({"terms": ("contrastive", "sigmoid", "pair_matching")}, [SOFTMAX, SIGMOID]),
        ({"terms": tuple(SIGMOIDS), "weights": SIGMOIDS}, [SIGMOID]),
        ({"terms": tuple(SIGMOIDS)}, [SIGMOID, SIGMOID]),
    ],
)
def test_pair_matching_joins_the_sweep_of_a_softmax(asked, sweeps, monkeypatch):
    called, call = recorded_calls(monkeypatch), similarity_call(30, 30, ids=True, **asked)
    outputs_of(function_of(call), call, call.typed(torch.float32))
    assert [name for name, _ in called] == sweeps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sigmoid_of_negatives_far_below_zero(backend, dtype):
    """e^-l overflows; the sigmoid's value and gradient are the same with and without a softmax term
    beside it.
    """
    image = torch.eye(20, 32).to(dtype).requires_grad_()
    text = -torch.eye(20, 32).roll(1, 0).to(dtype)
    results = {}
    for terms in (("contrastive", "sigmoid"), ("sigmoid",)):
        with simplclip.backend(backend):
            losses = similarity_loss(image, text, 300.0, logit_bias=-10.0, terms=terms)
        results[terms] = losses["sigmoid"], *torch.autograd.grad(losses["sigmoid"], image)
    assert all(t.isfinite().all() for tensors in results.values() for t in tensors)
    torch.testing.assert_close(*results.values(), rtol=1e-2, atol=1e-6)


def test_pair_matching_in_float64_is_exact_above_the_threshold_of_softplus():
    """All similarities are equal, and all logits are 21, where F.softplus returns 21 itself."""
    image = torch.ones(2, 1, dtype=torch.float64)
    text = torch.full((2, 1), 0.5, dtype=torch.float64)
    q = torch.tensor(20.5, dtype=torch.float64, requires_grad=True)
    out = similarity_loss(image, text, 1.0, terms=("pair_matching",), plane=(1.0, q))
    (slope,) = torch.autograd.grad(out["pair_matching"], q)
    assert out["pair_matching"].item() == pytest.approx(
        10.5 + math.log1p(math.exp(-21)), rel=1e-15, abs=0
    )
    assert slope.item() == pytest.approx(math.tanh(21 / 2) / 2, rel=1e-15, abs=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_feature_of_a_lone_pair(backend):
    """There are no negatives; softplus(-inf) would make the loss 0."""
    image, text = torch.tensor([[math.inf, 1.0]]), torch.tensor([[1.0, 1.0]])
    terms = "contrastive", "pair_matching"
    with simplclip.backend(backend):
        terms = similarity_loss(image, text, 1.0, terms=terms, plane=(1.0, 0.0))
    assert terms["contrastive"].isnan()
    assert terms["pair_matching"].isnan()
