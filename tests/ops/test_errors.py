"""Errors of the ops name the argument, the expectation and the given value; a teacher's gradient
causes a warning.
"""

import functools

import numpy as np
import pytest
import torch

from simplclip import ops
from simplclip.selftest.calls import attention_call, block_call, mlp_call

GOOD = torch.randn(4, 8)
zeros = torch.zeros
ones = torch.ones
meta = functools.partial(torch.zeros, device="meta")
TEACHER = {
    "terms": ("relational",),
    "teacher_image": GOOD,
    "teacher_text": GOOD,
    "teacher_scale": 10.0,
}
# argument -> those that it is read beside
BESIDE = dict.fromkeys(("teacher_image", "teacher_text", "teacher_scale"), TEACHER)
BESIDE["plane"] = {"terms": ("pair_matching",)}
CALLS = {
    "similarity_loss": {"image": GOOD, "text": GOOD, "logit_scale": 10.0},
    "feature_loss": {"student": GOOD, "teacher": GOOD},
    **{call.op: call.typed(torch.float32) for call in (attention_call(), mlp_call(), block_call())},
}
# (op, kind of error) -> an argument, its value, and what is expected instead, or, where the error
# names another argument, the message.
BAD = {
    ("similarity_loss", ValueError): [
        ("image", zeros(4), r"a tensor \[N, D\], got shape \[4\]"),
        ("text", zeros(4, 9), "the width of image, 8, got 9"),
        ("text", meta(4, 8), "the device of image, cpu, got meta"),
        ("image", GOOD[:0], r"at least one row .* got shape \[0, 8\]"),
        ("text", zeros(3, 8), "at least as many rows as image, 4, got 3"),
        ("label_offset", 1, "0 <= label_offset <= M - N = 0 .* got 1"),
        ("ids", torch.arange(3), r"shape \[N\] = \[4\], got \[3\]"),
        ("text_ids", torch.arange(4), "ids: expected ids for the rows beside text_ids"),
        ("logit_scale", ones(2), r"one element, got shape \[2\]"),
        ("terms", (), "a tuple of at least one of"),
        ("terms", (5,), r"a tuple of at least one of contrastive, .* got \(5,\)"),
        ("terms", ("pair_matching",), "plane: expected .* got NoneType"),
        ("plane", (ones(5), 0.0), r"plane's p: expected one element, got shape \[5\]"),
        ("terms", ("relational",), "teacher_image: expected .* term 'relational' needs it"),
        ("teacher_scale", None, ".* got None"),
        ("teacher_image", zeros(5, 8), r"the 4 rows of image, got shape \[5, 8\]"),
        ("teacher_text", meta(4, 8), "the device of text, cpu, got meta"),
        ("divergence", "js", "one of 'kl', 'cross_entropy', got 'js'"),
        ("scratch_bytes", -1, "a number of bytes, 0 or more, got -1"),
    ],
    ("similarity_loss", TypeError): [
        ("text", [1.0], r"a tensor \[M, D\], got list"),
        ("text", GOOD.bfloat16(), "the dtype of image, torch.float32, got torch.bfloat16"),
        ("image", GOOD.long(), "float32, .* got torch.int64"),
        ("ids", torch.arange(4).to_sparse(), "a tensor with strides, got the layout sparse_coo"),
        ("label_offset", 0.5, "an int, got float"),
        ("symmetric", "x", "a bool, got str"),
        ("group", "world", "a process group, got str"),
        ("logit_scale", "10", "a number or a tensor with one element, got str"),
        ("logit_scale", np.ones(2), "a number or a tensor with one element, got ndarray"),
        ("ids", torch.arange(4.0), r"an int64 or int32 tensor \[N\], got torch.float32"),
        ("logit_scale", torch.tensor(3), "float32, .* got torch.int64"),
        ("logit_scale", ones((), dtype=torch.float8_e4m3fn), "float32, .* got torch.float8_e4m3fn"),
        ("plane", (ones(1).long(), 0.0), "plane's p: expected float32, .* got torch.int64"),
        ("teacher_text", GOOD.int(), "float32, .* got torch.int32"),
    ],
    ("feature_loss", ValueError): [
        ("student", zeros(4), r"a tensor \[N, D\], got shape \[4\]"),
        ("student", GOOD[:0], r"at least one row .* got shape \[0, 8\]"),
        ("teacher", meta(4, 8), "the device of student, cpu, got meta"),
        ("teacher", GOOD[:3], "one row for each of student's 4, got 3"),
        (
            "teacher",
            zeros(4, 9),
            r"student: .* of teacher, 9, or a projection \[9, 8\], got width 8",
        ),
        ("distance", "l2", "one of 'mse', 'smooth_l1', got 'l2'"),
        ("beta", 0, "a finite number above 0 .* got 0"),
        ("projection", zeros(8, 9), r"shape \[D, D_student\] = \[8, 8\], got \[8, 9\]"),
        ("projection", meta(8, 8), "the device of student, cpu, got meta"),
    ],
    ("feature_loss", TypeError): [
        ("teacher", [1.0], r"a tensor \[N, D\], got list"),
        ("teacher", GOOD.long(), "float32, .* got torch.int64"),
        ("beta", ones(()), "a number, got Tensor"),
        ("normalize", "no", "a bool, got str"),
        ("projection", 3, r"a tensor \[D, D_student\] .* got int"),
        ("projection", torch.eye(8).half(), "the dtype of student, torch.float32, got .*float16"),
    ],
    ("shaped_attention", ValueError): [
        ("q", zeros(2, 5, 12), r"\[B, L, H, K\], got shape \[2, 5, 12\]"),
        ("q", zeros(2, 0, 3, 4), r".* without an empty dimension, got shape \[2, 0, 3, 4\]"),
        ("k", zeros(2, 6, 3, 4), r"\[B, L, H, K\] = \[2, 5, 3, 4\], got shape \[2, 6, 3, 4\]"),
        ("v", meta(2, 5, 3, 4), "the device of q, cpu, got meta"),
        ("beta", ones(4), r"\[H\] = \[3\], got shape \[4\]"),
        ("scale", float("nan"), "a finite number, got nan"),
        ("lengths", torch.tensor([1, 2, 3]), r"one per sequence, \[2\], got \[3\]"),
        ("lengths", torch.tensor([1, 6]), "0 to 5 valid tokens, got 6"),
    ],
    ("shaped_attention", TypeError): [
        ("v", zeros(2, 5, 3, 4).half(), "the dtype of q.*float16"),
        ("q", zeros(2, 5, 3, 4).int(), "float32, .* got torch.int32"),
        ("gamma", 1.0, "a tensor, got float"),
        ("scale", "1", "a number, got str"),
        ("causal", "no", "a bool, got str"),
        ("lengths", [1, 2], "an integer tensor"),
        ("lengths", torch.tensor([1.0, 2.0]), "an integer dtype, got torch.float32"),
    ],
    ("parallel_mlp", ValueError): [
        ("x", zeros(7, 5), r"\[..., C\] = \[..., 6\], got shape \[7, 5\]"),
        ("x", zeros(0, 6), ".* without an empty dimension"),
        ("fc1_weight", zeros(6), r"\[F, C\]"),
        ("fc1_bias", zeros(9), r"\[F\] = \[10\], got shape \[9\]"),
        ("fc2_weight", zeros(5, 9), r"\[O, F\] = \[5, 10\], got shape \[5, 9\]"),
        ("fc2_bias", meta(5), "the device of x, cpu, got meta"),
        ("act", "swish", "one of 'gelu', .* got 'swish'"),
    ],
    ("parallel_mlp", TypeError): [
        ("x", [1.0], "a tensor, got list"),
        ("x", zeros(7, 6).int(), "float32.* got torch.int32"),
        ("fc2_weight", zeros(5, 10).half(), "the dtype of x, .*float32, got .*float16"),
    ],
    ("simplified_block", ValueError): [
        ("x", zeros(5, 12), r"\[B, L, C\], got shape \[5, 12\]"),
        ("x", zeros(2, 0, 12), ".* without an empty dimension"),
        ("alpha", ones(5), r"one value per head, \[H\] with H a divisor of C = 12, got \[5\]"),
        ("beta", ones(4), r"\[H\] = \[3\], got shape \[4\]"),
        ("qk_weight", zeros(12, 12), r"\[2C, C\] = \[24, 12\], got shape \[12, 12\]"),
        ("norm", "batchnorm", "one of 'layernorm', 'rmsnorm', got 'batchnorm'"),
        ("norm", "rmsnorm", "norm_bias: expected None, since RMSNorm has no bias, got a tensor"),
        ("norm_weight", meta(12), "the device of x, cpu, got meta"),
        ("lengths", torch.tensor([6, 1]), "0 to 5 valid tokens, got 6"),
        ("alpha", meta(3), "the device of x, cpu, got meta"),
        *(("eps", eps, f"a number above 0, got {eps}") for eps in (0.0, -1e-5)),
    ],
    ("simplified_block", TypeError): [
        ("qk_weight", zeros(24, 12).bfloat16(), "the dtype of x"),
        ("mlp_gain", "1", "a number or a tensor with one element, got str"),
        *((name, "no", "a bool, got str") for name in ("causal", "recompute")),
        *(
            (name, ones(3 if len(name) < 6 else ()).to(dtype), f"float32, .* got {dtype}")
            for name in ("alpha", "beta", "gamma", "mlp_gain", "attention_gain")
            for dtype in (torch.complex64, torch.bool, torch.int32, torch.float8_e4m3fn)
        ),
    ],
}


@pytest.mark.parametrize(
    ("op", "error", "name", "value", "message"),
    [
        pytest.param(*key, *case, id=f"{key[0]} {case[0]}: {case[2]}")
        for key, cases in BAD.items()
        for case in cases
    ],
)
def test_bad_input_is_named(op, error, name, value, message):
    if ": " not in message:
        message = f"{name}: expected {message}"
    with pytest.raises(error, match=message):
        getattr(ops, op)(**CALLS[op] | BESIDE.get(name, {}) | {name: value})


LAYOUTS = {
    "sparse_coo": torch.Tensor.to_sparse,
    "sparse_csr": torch.Tensor.to_sparse_csr,
    "mkldnn": torch.Tensor.to_mkldnn,
    "nested": lambda t: torch.nested.as_nested_tensor([t[0], t[0]]),
}


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
def test_tensors_without_strides(op, layout):
    call = CALLS[op] | (TEACHER if op == "similarity_loss" else {})
    names = [name for name, t in call.items() if isinstance(t, torch.Tensor) and t.dim()]
    for name in names[:1] if layout == "nested" else names:
        try:
            other = LAYOUTS[layout](call[name])
        except (RuntimeError, IndexError):  # the layout has no such shapes
            continue
        message = f"{name}: expected a tensor with strides, got the layout {layout}"
        with pytest.raises(TypeError, match=message):
            getattr(ops, op)(**call | {name: other})


@pytest.mark.parametrize(
    ("op", "teacher"), [("similarity_loss", "teacher_image"), ("feature_loss", "teacher")]
)
@pytest.mark.filterwarnings("error:.*requires a gradient")  # compiling causes other warnings
def test_a_teacher_that_requires_a_gradient_is_warned_about_and_gets_none(op, teacher):
    student = next(iter(CALLS[op]))
    call = CALLS[op] | (TEACHER if op == "similarity_loss" else {})
    call |= {student: GOOD.clone().requires_grad_(), teacher: GOOD.clone().requires_grad_()}

    def loss(**named):
        out = getattr(ops, op)(**named)
        return out["relational"] if op == "similarity_loss" else out

    with torch.no_grad():
        loss(**call)
    without = {student: GOOD, "text" if op == "similarity_loss" else student: GOOD}
    with pytest.warns(
        UserWarning, match=f"{teacher} requires a gradient, but is a constant here and gets none"
    ):
        value, constant = loss(**call), loss(**call | without)
    assert not constant.requires_grad
    torch.compiler.reset()  # compilations of other tests count towards the limit of recompilations
    torch.testing.assert_close(
        torch.compile(loss, fullgraph=True, backend="aot_eager")(**call), value
    )
    value.backward()
    assert call[teacher].grad is None
    assert call[student].grad is not None
