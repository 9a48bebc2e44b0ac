import warnings

import interpreter
import plain
import pytest
import torch
from devices import BACKENDS, DTYPES, needs_cpu_kernels
from interpreter import needs_interpreter
from tolerance import assert_within

import simplclip
from simplclip.ops import checks, feature_loss

MODES = [{"distance": "mse"}, {"distance": "smooth_l1", "beta": 0.05}, {"distance": "mse", "normalize": False}]
MODES.append({"distance": "smooth_l1", "beta": 0.7, "normalize": False})
SIZES = [(1, 7), (2, 48), (17, 513), (64, 48), (257, 7), (31, 1000)]


def make_features(n, d, seed=0):
    g = torch.Generator().manual_seed(seed)
    teacher = 3 * torch.randn(n, d, generator=g, dtype=torch.float64)
    return teacher + torch.randn(n, d, generator=g, dtype=torch.float64), teacher


def loss_and_grad(function, student, teacher, **options):
    """The mean's gradient would underflow in float16: the loss is scaled up, as a GradScaler does."""
    student = student.detach().requires_grad_()
    loss = function(student, teacher, **options)
    (loss * student.numel()).backward()
    return {"loss": loss.detach(), "d_student": student.grad}


def check(student, teacher, dtype, backend, teacher_dtype=None, **options):
    x, y = student.to(dtype), teacher.to(teacher_dtype or dtype)
    with simplclip.backend(backend):
        kernel = loss_and_grad(feature_loss, x, y, **options)
    assert kernel["loss"].dtype == torch.promote_types(dtype, torch.float32)
    assert kernel["d_student"].dtype == dtype
    truth = loss_and_grad(plain.feature_loss, x.double(), y.double(), **options)
    naive = loss_and_grad(plain.feature_loss, x, y, **options)
    assert_within(kernel, naive, truth, dtype, f"{backend} {dtype} {teacher_dtype} {tuple(x.shape)} {options}")


def check_everything(backend, sizes=SIZES):
    for n, d in sizes:
        student, teacher = make_features(n, d)
        for dtype in DTYPES:
            for mode in MODES:
                check(student, teacher, dtype, backend, **mode)
        check_zero_rows(backend, n + 1, d)
        check_nan(backend, n, d)


@pytest.mark.instruction_set
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_values_and_gradients(n, d, dtype, backend):
    for mode in MODES:
        check(*make_features(n, d), dtype, backend, **mode)


@pytest.mark.instruction_set
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_teacher_of_another_dtype_is_read_as_it_is(dtype, backend):
    for other in (*DTYPES, torch.float64):
        for mode in MODES:
            check(*make_features(19, 37), dtype, backend, teacher_dtype=other, **mode)
    check(*make_features(19, 37), torch.float64, "reference", teacher_dtype=dtype)


def check_zero_rows(backend, n, d):
    """A row of zeros, and one shorter than eps: divided by eps, which is a constant."""
    student, teacher = make_features(n, d)
    student[0] = 0
    teacher[n // 2] = 0
    check(student, teacher, torch.float32, backend)
    student[0] = teacher[0] * 1e-14
    check(student, teacher, torch.float32, backend)


def check_nan(backend, n, d):
    for mode in MODES:
        for which in (0, 1):
            pair = [t.float() for t in make_features(n, d)]
            pair[which][n // 2, d - 1] = torch.nan
            with simplclip.backend(backend):
                out = loss_and_grad(feature_loss, *pair, **mode)
            assert out["loss"].isnan(), (backend, mode, which)
            assert out["d_student"][n // 2, d - 1].isnan(), (backend, mode, which)
            others = torch.arange(n) != n // 2
            assert out["d_student"][others].isfinite().all(), (backend, mode, which)


@pytest.mark.instruction_set
@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_rows(backend):
    for n, d in ((1, 7), (40, 48), (33, 513)):
        check_zero_rows(backend, n, d)


@pytest.mark.instruction_set
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_the_loss_and_its_row(backend):
    check_nan(backend, 18, 37)


def check_one_column(backend):
    """Normalised to one of ±1: the distances are 0 and 4, the gradient is 0 up to rounding."""
    student, teacher = torch.tensor([[2.0], [-3.0], [5.0]]), torch.tensor([[1.0], [7.0], [-1.0]])
    for dtype in DTYPES:
        with simplclip.backend(backend):
            out = loss_and_grad(feature_loss, student.to(dtype), teacher.to(dtype))
        torch.testing.assert_close(out["loss"], torch.tensor(8 / 3))
        assert out["d_student"].abs().max() < 1e-5
        check(student, teacher, dtype, backend, normalize=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_column(backend):
    check_one_column(backend)


def check_strides(backend):
    student, teacher = (t.float() for t in make_features(33, 20))
    expected = loss_and_grad(feature_loss, student, teacher)
    for make in (lambda t: t.T.contiguous().T, lambda t: torch.randn(33, 60)[:, ::3].copy_(t)):
        assert not make(student).is_contiguous()
        with simplclip.backend(backend):
            got = loss_and_grad(feature_loss, make(student), make(teacher))
        for name in got:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-7)
    wide = torch.randn(1, 20).expand(33, 20)
    with simplclip.backend(backend):
        torch.testing.assert_close(feature_loss(student, wide), feature_loss(student, wide.contiguous()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    check_strides(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_uninitialised_memory_is_never_read(backend):
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        for mode in MODES:
            check(*make_features(35, 21), torch.bfloat16, backend, **mode)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.instruction_set
@needs_cpu_kernels
def test_half_precision_is_read_and_rounded_exactly():
    """Every float16 number is read exactly, and gradients of it round as torch rounds: d = (x − 0) · 2 / (N D) · grad."""
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    for scale in (1.0, 0.37, 3.1e-4, 7e-8, 1.9):
        student = numbers.clone().reshape(-1, 64).requires_grad_()
        with simplclip.backend("cpu"):
            loss = feature_loss(student, torch.zeros_like(student), normalize=False)
        loss.backward(torch.tensor(scale * student.numel() / 2))
        expected = (torch.tensor(scale) * numbers.float()).half()
        torch.testing.assert_close(student.grad.flatten(), expected, rtol=0, atol=0, equal_nan=True)


TRITON = """
import torch, simplclip, test_feature_loss as t
assert simplclip.report()["ops"]["feature_loss_fwd"]["cpu"]["backend"] == "triton"
t.check_everything("triton", [(1, 7), (5, 48), (130, 7), (3, 8300)])
for s in t.DTYPES:
    for o in (*t.DTYPES, torch.float64):
        t.check(*t.make_features(5, 21), s, "triton", teacher_dtype=o)
t.check_one_column("triton")
t.check_strides("triton")
t.test_uninitialised_memory_is_never_read("triton")
t.test_opcheck("triton")
print("done")
"""


@pytest.mark.slow
@needs_interpreter
def test_triton_through_its_interpreter():
    done = interpreter.run("-c", TRITON)
    assert done.stdout.strip() == "done", done.stderr


@needs_cpu_kernels
def test_runs_are_identical_with_any_number_of_threads():
    threads = torch.get_num_threads()
    try:
        for mode in MODES:
            pair = [t.float() for t in make_features(3001, 65)]
            first = loss_and_grad(feature_loss, *pair, **mode)
            for count in (threads, 1, 2, 3):
                torch.set_num_threads(count)
                again = loss_and_grad(feature_loss, *pair, **mode)
                assert all(torch.equal(first[name], again[name]) for name in first)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("mode", MODES)
def test_reference_gradcheck(mode):
    student, teacher = make_features(4, 5)
    student[1] = 0  # below eps the norm is a constant
    mode = {**mode, "beta": 0.31}
    with simplclip.backend("reference"):
        safe = student[[0, 2, 3]].requires_grad_()
        assert torch.autograd.gradcheck(lambda x: feature_loss(x, teacher[[0, 2, 3]], **mode), [safe])
    check(student, teacher, torch.float64, "reference", **mode)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    student, teacher = (t.float() for t in make_features(9, 13))
    for normalize in (True, False):
        torch.library.opcheck(
            torch.ops.simplclip.feature_loss_fwd,
            (student.requires_grad_(), teacher.half(), normalize, 0.5, normalize, backend),
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic):
    projection = torch.randn(20, 12, dtype=torch.float64)
    for mode in (*MODES[:2], {"projection": projection}):
        student, teacher = make_features(9, 20)
        student = student[:, :12] if "projection" in mode else student
        compiled = torch.compile(feature_loss, fullgraph=True, dynamic=dynamic)
        expected = loss_and_grad(feature_loss, student, teacher, **mode)
        got = loss_and_grad(compiled, student, teacher, **mode)
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-6)
    compiled(
        student.requires_grad_(), teacher.requires_grad_(), projection=projection
    )  # no warning, which would break the graph


def test_autocast_casts_the_student_and_returns_float32():
    student, teacher = (t.to(torch.bfloat16).float() for t in make_features(40, 24))
    expected = loss_and_grad(feature_loss, student.bfloat16(), teacher)
    projection = torch.randn(24, 24, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss_and_grad(feature_loss, student, teacher)
        wide = feature_loss(student.double(), teacher)
        feature_loss(student, teacher.half(), projection=projection).backward()
    assert got["loss"].dtype == got["d_student"].dtype == torch.float32
    assert wide.dtype == torch.float64
    assert projection.grad.dtype == torch.float32
    for name in expected:
        torch.testing.assert_close(got[name], expected[name].float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_projection_and_its_gradient(backend):
    student, _ = make_features(21, 12)
    _, teacher = make_features(21, 20, seed=1)
    weight = torch.randn(20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    results = {}
    for name, function, dtype in (
        ("kernel", feature_loss, torch.float32),
        ("plain", plain.feature_loss, torch.float32),
        ("truth", plain.feature_loss, torch.float64),
    ):
        projection = weight.to(dtype).requires_grad_()
        with simplclip.backend(backend):
            out = loss_and_grad(function, student.to(dtype), teacher.to(dtype), projection=projection)
        results[name] = {**out, "d_projection": projection.grad}
    assert_within(*results.values(), torch.float32, backend)


def test_teacher_gets_no_gradient_and_one_warning_says_so(monkeypatch):
    monkeypatch.setattr(checks, "_warned", set())
    student, teacher = (t.float().requires_grad_() for t in make_features(6, 8))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        feature_loss(student, teacher)
    with pytest.warns(UserWarning, match="teacher requires a gradient, but is a constant here and gets none"):
        loss = feature_loss(student, teacher)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        feature_loss(student, teacher)
    loss.backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, loss_and_grad(plain.feature_loss, student, teacher.detach())["d_student"] / 48)
    assert not feature_loss(student.detach(), teacher).requires_grad


GOOD = torch.randn(4, 8)
BAD_CALLS = {
    "rank": (dict(student=torch.randn(4)), ValueError, r"student: expected a tensor \[N, D\], got shape \[4\]"),
    "not a tensor": (dict(teacher=[1.0]), TypeError, r"teacher: expected a tensor \[N, D\], got list"),
    "empty": (dict(student=GOOD[:0]), ValueError, r"student: expected at least one row .* got shape \[0, 8\]"),
    "integers": (dict(teacher=GOOD.long()), TypeError, "teacher: expected float32, .* got torch.int64"),
    "device": (dict(teacher=GOOD.to("meta")), ValueError, "teacher: expected the device of student, cpu, got meta"),
    "rows": (dict(teacher=GOOD[:3]), ValueError, "teacher: expected one row for each of student's 4, got 3"),
    "width": (
        dict(teacher=torch.randn(4, 9)),
        ValueError,
        r"student: expected the width of teacher, 9, or a projection \[9, 8\], got width 8",
    ),
    "distance": (dict(distance="l2"), ValueError, "distance: expected one of 'mse', 'smooth_l1', got 'l2'"),
    "beta": (dict(beta=0), ValueError, "beta: expected a finite number above 0 .* got 0"),
    "beta infinite": (dict(beta=float("inf")), ValueError, "beta: expected a finite number above 0 .* got inf"),
    "beta type": (dict(beta=torch.ones(())), TypeError, "beta: expected a number, got Tensor"),
    "projection": (
        dict(projection=torch.randn(8, 9)),
        ValueError,
        r"projection: expected shape \[D, D_student\] = \[8, 8\], got \[8, 9\]",
    ),
    "projection type": (dict(projection=3), TypeError, r"projection: expected a tensor \[D, D_student\] .* got int"),
    "projection dtype": (
        dict(projection=torch.eye(8).half()),
        TypeError,
        "projection: expected the dtype of student, torch.float32, got torch.float16",
    ),
    "projection device": (
        dict(projection=torch.eye(8, device="meta")),
        ValueError,
        "projection: expected the device of student, cpu, got meta",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_is_named(case):
    changes, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        feature_loss(**{"student": GOOD, "teacher": GOOD, **changes})
