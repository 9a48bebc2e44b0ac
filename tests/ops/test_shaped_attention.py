"""shaped_attention against its definition, on every backend that runs here. Kernels of a GPU have files of their own."""

import itertools

import plain
import pytest
import torch
from calls import ATTENTION as NAMES
from calls import attention_inputs as inputs
from devices import BACKENDS, DTYPES, needs_cpu_kernels
from tolerance import assert_within

import simplclip
from simplclip.memory.measure import cpu_peak_bytes
from simplclip.ops import shaped_attention


def values_and_grads(function, tensors, grad, **options):
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    out = function(*leaves, **options)
    out.backward(grad.to(out.dtype))
    return {"out": out.detach(), **{f"d_{name}": leaf.grad for name, leaf in zip(NAMES, leaves)}}


def check(shape, dtype, backend, *, lengths=None, causal=False, scale=None, gains=None, seed=0):
    b, length, h, k = shape
    q, k_, v, *drawn = inputs(b, length, h, k, seed=seed)
    gains = drawn if gains is None else [torch.full((h,), float(x), dtype=torch.float64) for x in gains]
    grad = inputs(b, length, h, k, seed=seed + 1)[0]
    low = [t.to(dtype) for t in (q, k_, v)] + [t.float() for t in gains]
    options = {"causal": causal, "scale": scale, "lengths": None if lengths is None else torch.tensor(lengths)}
    with simplclip.backend(backend):
        kernel = values_and_grads(shaped_attention, low, grad.to(dtype), **options)
    assert kernel["out"].dtype == dtype
    truth = values_and_grads(plain.shaped_attention, [t.double() for t in low], grad.to(dtype).double(), **options)
    naive = values_and_grads(plain.shaped_attention, low, grad.to(dtype), **options)
    assert_within(kernel, naive, truth, dtype, f"{backend} {dtype} {shape} causal={causal} lengths={lengths}", 1e-3)


def check_everything(backend, dtypes=DTYPES):
    """Lengths around the tiles of 6 rows and the blocks of 240, widths on and off the vectors."""
    for (length, k), causal in itertools.product(((1, 32), (2, 20), (6, 16), (17, 64), (77, 64), (64, 33), (250, 8)), (0, 1)):
        for dtype in dtypes:
            check((2, length, 2, k), dtype, backend, causal=bool(causal))
            check((4, length, 2, k), dtype, backend, causal=bool(causal), lengths=[length, 0, (length + 1) // 2, 1])
    check((1, 19, 2, 8), torch.float32, backend, scale=-3.0, causal=True)
    check((1, 19, 2, 8), torch.float32, backend, gains=(0, 0, 1))
    check((1, 19, 2, 8), torch.float32, backend, gains=(1, 0, 0), causal=True)
    check((1, 19, 2, 8), torch.float32, backend, gains=(0, 1, 0), causal=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [None, [5, 2], [0, 1]])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_values_are_those_of_the_definition(causal, lengths, scale):
    args = inputs()
    lengths = None if lengths is None else torch.tensor(lengths)
    options = {"scale": scale, "causal": causal, "lengths": lengths}
    expected = plain.attention_by_loops(*args, **options)
    for form in (shaped_attention, plain.shaped_attention):
        out = form(*args, **options)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [None, [4, 0, 2]])
def test_gradients(causal, lengths):
    args = [t.requires_grad_() for t in inputs(b=3, length=4, h=2, k=3)]
    lengths = None if lengths is None else torch.tensor(lengths)
    assert torch.autograd.gradcheck(lambda *a: shaped_attention(*a, causal=causal, lengths=lengths), args)


@pytest.mark.instruction_set
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_within_tolerance(dtype, backend):
    check_everything(backend, [dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [50, 197, 257, 288])
def test_image_towers(dtype, backend, length):
    check((1, length, 2, 64), dtype, backend)
    check((2, length, 1, 80), dtype, backend, causal=True, lengths=[length, length - 3])


def test_zero_queries_and_equal_gains_give_the_identity():
    q, k, v, *_ = inputs()
    for dtype, causal in itertools.product((torch.float64, *DTYPES), (False, True)):
        one = torch.ones(3)
        out = shaped_attention(torch.zeros_like(q, dtype=dtype), k.to(dtype), v.to(dtype), one, one, one, causal=causal)
        # The weights beta A − gamma C cancel before they are rounded: what stays is v itself, in half dtypes too.
        torch.testing.assert_close(out, v.to(dtype), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_padded_tokens_are_neither_read_nor_written(backend, dtype, causal):
    lengths = torch.tensor([3, 0, 5])
    clean = [t.to(dtype) if t.dim() == 4 else t.float() for t in inputs(b=3)]
    grad = torch.ones_like(clean[0])
    dirty, dirty_grad = [t.clone() for t in clean], grad.clone()
    for t in (*dirty[:3], dirty_grad):
        t[0, 3:], t[1] = float("nan"), float("nan")
    with simplclip.backend(backend):
        expected, found = (
            values_and_grads(shaped_attention, tensors, g, lengths=lengths, causal=causal)
            for tensors, g in ((clean, grad), (dirty, dirty_grad))
        )
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
        if value.dim() == 4:
            assert not value[0, 3:].any(), name
            assert not value[1].any(), name


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_are_read_in_place(dtype):
    """q and k of one product, v a view of a wider tensor, a gradient of other strides: as their copies, bit for bit."""
    qk, wide = torch.randn(3, 9, 2, 4, 16).to(dtype), torch.randn(3, 9, 4, 40).to(dtype)
    grad = torch.randn(3, 4, 9, 16).to(dtype).transpose(1, 2)
    views = [qk[:, :, 0], qk[:, :, 1], wide[..., 7:23], *(torch.randn(4) for _ in range(3))]
    options = {"lengths": torch.tensor([9, 4, 1]), "causal": True}
    strided = values_and_grads(shaped_attention, views, grad, **options)
    packed = values_and_grads(shaped_attention, [t.contiguous() for t in views], grad.contiguous(), **options)
    for name, value in strided.items():
        assert torch.equal(value, packed[name]), name
    last = [t.transpose(1, 3).contiguous().transpose(1, 3) if t.dim() == 4 else t for t in views]
    assert last[0].stride(-1) != 1
    assert torch.equal(shaped_attention(*last, **options), strided["out"])


@needs_cpu_kernels
def test_equal_runs_give_equal_bits():
    tensors = [t.float() for t in inputs(b=9, length=33, h=4, k=32)]
    first, second = (values_and_grads(shaped_attention, tensors, tensors[2], causal=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    q, k, v, *_ = (t.float() for t in inputs(b=2, length=7))
    gains = torch.randn(3, 3)
    for lengths in (None, torch.tensor([7, 2], dtype=torch.int32)):
        args = [t.requires_grad_() for t in (q.clone(), k.clone(), v.clone(), gains.clone())]
        torch.library.opcheck(torch.ops.simplclip.shaped_attention_fwd, (*args, lengths, 0.3, True, backend))


@needs_cpu_kernels
@pytest.mark.parametrize(("length", "k"), [(77, 64), (300, 20)])
def test_memory_is_inputs_results_and_the_log_sum_exps(length, k):
    tensors = [t.float().requires_grad_() for t in inputs(4, length, 2, k)]
    grad = torch.ones(4, length, 2, k)
    shaped_attention(*tensors).backward(grad)
    for t in tensors:
        t.grad = None
    peak = cpu_peak_bytes(lambda: shaped_attention(*tensors).backward(grad))
    results = 4 * grad.nbytes  # out and three gradients; the scratch of a thread's head is not torch's
    assert peak <= results + 4 * 4 * 2 * length + 4096  # the log-sum-exps
    assert peak >= results


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": torch.zeros(2, 5, 12)}, ValueError, r"q: expected a tensor \[B, L, H, K\]"),
        (
            {"q": torch.zeros(2, 0, 3, 4)},
            ValueError,
            r"q: expected \[B, L, H, K\] without an empty dimension, got shape \[2, 0, 3, 4\]",
        ),
        ({"k": torch.zeros(2, 6, 3, 4)}, ValueError, r"k: expected the shape of q.*\[2, 6, 3, 4\]"),
        ({"v": torch.zeros(2, 5, 3, 8)}, ValueError, r"v: expected the shape of q.*\[2, 5, 3, 8\]"),
        ({"v": torch.zeros(2, 5, 3, 4).half()}, TypeError, "v: expected the dtype of q.*float16"),
        ({"v": torch.zeros(2, 5, 3, 4, device="meta")}, ValueError, "v: expected the device of q, cpu, got meta"),
        ({"q": torch.zeros(2, 5, 3, 4).int()}, TypeError, "q: expected float32, .* got torch.int32"),
        ({"beta": torch.ones(4)}, ValueError, r"beta: expected one value per head, \[3\], got \[4\]"),
        ({"gamma": 1.0}, TypeError, "gamma: expected a tensor, got float"),
        ({"scale": "1"}, TypeError, "scale: expected a number, got str"),
        ({"scale": float("nan")}, ValueError, "scale: expected a finite number, got nan"),
        ({"lengths": [1, 2]}, TypeError, "lengths: expected an integer tensor"),
        ({"lengths": torch.tensor([1.0, 2.0])}, TypeError, "lengths: expected an integer dtype, got torch.float32"),
        ({"lengths": torch.tensor([1, 2, 3])}, ValueError, r"lengths: expected one per sequence, \[2\], got \[3\]"),
        ({"lengths": torch.tensor([1, 6])}, ValueError, "lengths: expected 0 to 5 valid tokens, got 6"),
        ({"lengths": torch.tensor([-1, 5])}, ValueError, "lengths: expected 0 to 5 valid tokens, got -1"),
    ],
)
def test_errors_name_argument_expectation_and_what_came(change, error, words):
    arguments = dict(zip(NAMES, inputs(dtype=torch.float32), strict=True)) | change
    with pytest.raises(error, match=words):
        shaped_attention(**arguments)
