import itertools

import pytest
import similarity
import torch
from devices import BACKENDS, DTYPES, needs_cpu_kernels
from similarity import WIDTH, check, values_and_grads

import simplclip
from simplclip.ops import similarity_loss

TERMS = ("contrastive", "pair_matching")


def make_inputs(n, m, offset=0, **options):
    return similarity.make_inputs(n, m, offset, terms=TERMS, **options)


def both(image, text, scale, **options):
    return similarity_loss(image, text, scale, **{"terms": TERMS, **options})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 257, 1000])
def test_values_and_gradients(n, dtype, backend):
    for plane in ("scalar", "hadamard"):
        for negatives in ("all", "hard", "shift"):
            if (negatives == "shift" and n == 1) or (n == 1000 and backend == "reference" and plane == "hadamard"):
                continue
            leaves, options = make_inputs(n, n, plane=plane)
            check(leaves, {**options, "negatives": negatives}, dtype, backend)


@pytest.mark.slow
@pytest.mark.instruction_set
@needs_cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(dtype):
    for (n, m, offset), negatives in itertools.product(((3, 3, 0), (70, 97, 5)), ("all", "hard")):
        leaves, options = make_inputs(n, m, offset, ids=n > 3)
        check(leaves, {**options, "negatives": negatives}, dtype, "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("negatives", ["all", "hard", "shift"])
def test_rectangular_with_offset(negatives, symmetric, backend):
    for n, m, offset in ((1, 2, 1), (3, 70, 67), (100, 333, 57), (65, 130, 0)):
        leaves, options = make_inputs(n, m, offset)
        check(leaves, {**options, "negatives": negatives, "symmetric": symmetric}, torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("negatives", ["all", "hard", "shift"])
def test_equal_ids_are_no_negatives(negatives, backend):
    for n, m, offset in ((2, 2, 0), (17, 17, 0), (200, 200, 0), (50, 140, 60)):
        for plane in ("scalar", "hadamard"):
            leaves, options = make_inputs(n, m, offset, plane=plane, ids=True)
            check(leaves, {**options, "negatives": negatives}, torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_ids_equal_leaves_no_negatives(backend):
    leaves, options = make_inputs(20, 20)
    options |= {"ids": torch.zeros(20, dtype=torch.int64), "text_ids": torch.zeros(20, dtype=torch.int64)}
    for negatives in ("all", "hard"):
        with simplclip.backend(backend):
            out = values_and_grads(similarity_loss, leaves, torch.float32, negatives=negatives, **options)
        assert out["contrastive"] == 0
        assert all(v.isfinite().all() for v in out.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plane", ["scalar", "hadamard"])
@needs_cpu_kernels
def test_chunks_and_stored_rows_change_nothing(plane, dtype):
    """One chunk or several, the last not whole, and an end of the stored rows between them."""
    leaves, options = make_inputs(300, 310, 7, plane=plane, ids=True)
    row = 310 * (4 if dtype == torch.float16 else dtype.itemsize)
    for scratch, store in (
        (0, 0),
        (64 * row, 0),
        (128 * row, 0),
        (128 * row, 64 * row),
        (128 * row, 192 * row),
        (1 << 20, 1 << 20),
    ):
        for negatives in ("all", "hard"):
            check(leaves, {**options, "negatives": negatives}, dtype, "cpu", scratch_bytes=scratch, store_bytes=store)


@needs_cpu_kernels
@pytest.mark.parametrize("n", [4, 40, 100])
def test_columns_far_below_their_strip_are_summed_afresh(n):
    """One logit of 300: against it every exponential of the other columns underflows."""
    leaves, options = make_inputs(n, n, width=n, scale=1.0)
    leaves["text"] = torch.eye(n, dtype=torch.float64)  # S is image itself
    leaves["image"] = torch.rand(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    leaves["image"][0, 1] = 300
    for negatives in ("all", "hard"):
        check(leaves, {**options, "negatives": negatives}, torch.float32, "cpu")


@pytest.mark.parametrize("scale", [0.01, 100.0, 1000.0, -50.0])
@needs_cpu_kernels
def test_wide_logits(scale):
    """Rows and columns whose statistics lie too far apart for one exponential to serve both."""
    leaves, options = make_inputs(150, 150, scale=scale)
    leaves["image"][::3] *= 3  # unnormalised features are no error
    for negatives in ("all", "hard"):
        check(leaves, {**options, "negatives": negatives}, torch.float32, "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    leaves, options = make_inputs(33, 33)
    padded = {k: v if v.dim() == 0 else torch.randn(33, 3 * WIDTH)[:, ::3].copy_(v) for k, v in leaves.items()}
    padded["text"] = leaves["text"].float().T.contiguous().T
    plain = {k: v.float().contiguous() for k, v in leaves.items()}
    assert not padded["image"].is_contiguous()
    assert not padded["text"].is_contiguous()
    with simplclip.backend(backend):
        a = values_and_grads_in_place(padded, **options)
        b = values_and_grads_in_place(plain, **options)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-7)


def values_and_grads_in_place(leaves, **options):
    args = {
        k: v.float().detach().requires_grad_() if v.dim() == 0 else v.detach().requires_grad_() for k, v in leaves.items()
    }
    terms = both(
        args["image"], args["text"], args["logit_scale"], plane=(args["plane_weight"], args["plane_bias"]), **options
    )
    sum(terms.values()).backward()
    return {**{k: v.detach() for k, v in terms.items()}, **{k: v.grad for k, v in args.items()}}


@pytest.mark.parametrize("backend", BACKENDS)
def test_uninitialised_memory_is_never_read(backend):
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        for plane in ("scalar", "hadamard"):
            leaves, options = make_inputs(70, 90, 11, plane=plane)
            for negatives in ("all", "hard"):
                check(leaves, {**options, "negatives": negatives}, torch.bfloat16, backend, scratch_bytes=0)
    finally:
        torch.use_deterministic_algorithms(False)


@needs_cpu_kernels
def test_runs_are_identical():
    for dtype in DTYPES:
        leaves, options = make_inputs(300, 300, ids=True)
        first, second = (values_and_grads(similarity_loss, leaves, dtype, negatives="hard", **options) for _ in range(2))
        for name in first:
            assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("negatives", ["all", "hard", "shift"])
@pytest.mark.parametrize("plane", ["scalar", "hadamard"])
def test_reference_gradcheck(plane, negatives):
    leaves, options = make_inputs(5, 7, 2, plane=plane, ids=True, width=6, scale=4.0)
    if negatives == "hard":  # its weights are detached: compared with autograd of the dense form instead
        check(leaves, {**options, "negatives": negatives}, torch.float64, "reference")
        return
    args = [v.clone().requires_grad_() for v in leaves.values()]

    def run(image, text, scale, weight, bias):
        with simplclip.backend("reference"):
            return tuple(both(image, text, scale, plane=(weight, bias), negatives=negatives, **options).values())

    assert torch.autograd.gradcheck(run, args)


@pytest.mark.parametrize("fused", [0, 1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, fused):
    leaves, _ = make_inputs(9, 12, 2)
    image, text, scale, *plane = (v.float().requires_grad_() for v in leaves.values())
    nothing = [None] * 6
    torch.library.opcheck(
        torch.ops.simplclip.similarity_loss_fwd,
        (image, text, scale, *nothing, *(plane if fused else (None, None)), torch.arange(9), torch.arange(12),
         2, True, True, fused, False, False, 1.0, 64, 0, backend),
        rtol=1e-4,
        atol=1e-5,
    )  # fmt: skip


def test_autocast_casts_the_features_and_returns_float32():
    leaves, options = make_inputs(40, 40)
    half = {k: v.to(torch.bfloat16).float() if k in ("image", "text") else v for k, v in leaves.items()}
    expected = values_and_grads(similarity_loss, half, torch.bfloat16, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = values_and_grads(similarity_loss, half, torch.float32, **options)
        mixed = both(leaves["image"].float(), leaves["text"].bfloat16(), 10.0, plane=(1.0, 0.0))
    assert got["contrastive"].dtype == mixed["contrastive"].dtype == torch.float32
    assert got["d_image"].dtype == torch.float32
    for name in expected:
        torch.testing.assert_close(got[name], expected[name].to(got[name].dtype), rtol=1e-5, atol=1e-7)


def test_only_what_needs_a_gradient_gets_one():
    leaves, options = make_inputs(20, 20)
    args = {k: v.float() for k, v in leaves.items()}
    args["text"].requires_grad_()
    out = both(args["image"], args["text"], args["logit_scale"], plane=(args["plane_weight"], args["plane_bias"]), **options)
    sum(out.values()).backward()
    expected = values_and_grads(similarity_loss, leaves, torch.float32, weights=(1, 1), **options)
    torch.testing.assert_close(args["text"].grad, expected["d_text"])
    assert args["image"].grad is None


def test_logit_bias_changes_nothing_and_gets_a_zero_gradient():
    leaves, _ = make_inputs(10, 10)
    image, text = leaves["image"].float(), leaves["text"].float().requires_grad_()
    bias = torch.tensor(-10.0, requires_grad=True)
    with_bias = similarity_loss(image, text, 14.0, logit_bias=bias)["contrastive"]
    with_bias.backward()
    assert with_bias == similarity_loss(image, text, 14.0)["contrastive"]
    assert bias.grad == 0


def test_nan_reaches_the_loss():
    leaves, _ = make_inputs(30, 30)
    image = leaves["image"].float()
    image[3, 3] = torch.nan
    assert similarity_loss(image, leaves["text"].float(), 10.0)["contrastive"].isnan()
