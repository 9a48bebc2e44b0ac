"""Errors of the ops name the argument, the expectation and the given value; a teacher's gradient
causes a warning.
"""

import functools

import numpy as np
import pytest
import torch

from simplclip import ops
from simplclip.ops import checks
from simplclip.selftest.calls import attention_call, block_call, mlp_call
from support.devices import needs_cpu_kernels
from support.ops import layouts

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
PLANE = {"terms": ("pair_matching",), "plane": (1.0, 0.0)}
CALLS = {
    "similarity_loss": {"image": GOOD, "text": GOOD, "logit_scale": 10.0},
    "feature_loss": {"student": GOOD, "teacher": GOOD},
    **{call.op: call.typed(torch.float32) for call in (attention_call(), mlp_call(), block_call())},
}
# (op, kind of error) -> changes of the op's call, and the messages.
BAD = {
    ("similarity_loss", ValueError): [
        (dict(image=zeros(4)), r"image: expected a tensor \[N, D\], got shape \[4\]"),
        (dict(text=zeros(4, 9)), "text: expected the width of image, 8, got 9"),
        (dict(text=meta(4, 8)), "text: expected the device of image, cpu, got meta"),
        (dict(image=GOOD[:0]), r"image: expected at least one row .* got shape \[0, 8\]"),
        (dict(text=zeros(3, 8)), "text: expected at least as many rows as image, 4, got 3"),
        (dict(label_offset=1), "label_offset: expected 0 <= label_offset <= M - N = 0 .* got 1"),
        (dict(ids=torch.arange(3)), r"ids: expected shape \[N\] = \[4\], got \[3\]"),
        (dict(text_ids=torch.arange(4)), "ids: expected ids for the rows beside text_ids"),
        (dict(logit_scale=ones(2)), r"logit_scale: expected one element, got shape \[2\]"),
        (dict(terms=()), "terms: expected a tuple of at least one of"),
        (
            dict(terms=(5,)),
            r"terms: expected a tuple of at least one of contrastive, .* got \(5,\)",
        ),
        (dict(terms=("pair_matching",)), "plane: expected .* got NoneType"),
        (dict(PLANE, plane=(ones(5), 0.0)), r"plane: expected w \[D\] = \[8\], got shape \[5\]"),
        (dict(terms=("relational",)), "teacher_image: expected .* term 'relational' needs it"),
        (dict(TEACHER, teacher_scale=None), "teacher_scale: expected .* got None"),
        (
            dict(TEACHER, teacher_image=zeros(5, 8)),
            r"teacher_image: expected the 4 rows of image, got shape \[5, 8\]",
        ),
        (
            dict(TEACHER, teacher_text=meta(4, 8)),
            "teacher_text: expected the device of text, cpu, got meta",
        ),
        (dict(divergence="js"), "divergence: expected one of 'kl', 'cross_entropy', got 'js'"),
        (dict(scratch_bytes=-1), "scratch_bytes: expected a number of bytes, 0 or more, got -1"),
    ],
    ("similarity_loss", TypeError): [
        (dict(text=[1.0]), r"text: expected a tensor \[M, D\], got list"),
        (
            dict(text=GOOD.bfloat16()),
            "text: expected the dtype of image, torch.float32, got torch.bfloat16",
        ),
        (dict(image=GOOD.long()), "image: expected float32, .* got torch.int64"),
        (
            dict(ids=torch.arange(4).to_sparse()),
            "ids: expected a tensor with strides, got the layout sparse_coo",
        ),
        (dict(label_offset=0.5), "label_offset: expected an int, got float"),
        (dict(symmetric="x"), "symmetric: expected a bool, got str"),
        (dict(group="world"), "group: expected a process group, got str"),
        (
            dict(logit_scale="10"),
            "logit_scale: expected a number or a tensor with one element, got str",
        ),
        (
            dict(logit_scale=np.ones(2)),
            "logit_scale: expected a number or a tensor with one element, got ndarray",
        ),
        (
            dict(ids=torch.arange(4.0)),
            r"ids: expected an int64 or int32 tensor \[N\], got torch.float32",
        ),
        (dict(logit_scale=torch.tensor(3)), "logit_scale: expected float32, .* got torch.int64"),
        (
            dict(logit_scale=ones((), dtype=torch.float8_e4m3fn)),
            "logit_scale: expected float32, .* got torch.float8_e4m3fn",
        ),
        (
            dict(PLANE, plane=(ones(8).long(), 0.0)),
            "plane's w: expected float32, .* got torch.int64",
        ),
        (
            dict(TEACHER, teacher_text=GOOD.int()),
            "teacher_text: expected float32, .* got torch.int32",
        ),
    ],
    ("feature_loss", ValueError): [
        (dict(student=zeros(4)), r"student: expected a tensor \[N, D\], got shape \[4\]"),
        (dict(student=GOOD[:0]), r"student: expected at least one row .* got shape \[0, 8\]"),
        (dict(teacher=meta(4, 8)), "teacher: expected the device of student, cpu, got meta"),
        (dict(teacher=GOOD[:3]), "teacher: expected one row for each of student's 4, got 3"),
        (
            dict(teacher=zeros(4, 9)),
            r"student: expected the width of teacher, 9, or a projection \[9, 8\], got width 8",
        ),
        (dict(distance="l2"), "distance: expected one of 'mse', 'smooth_l1', got 'l2'"),
        (dict(beta=0), "beta: expected a finite number above 0 .* got 0"),
        (
            dict(projection=zeros(8, 9)),
            r"projection: expected shape \[D, D_student\] = \[8, 8\], got \[8, 9\]",
        ),
        (dict(projection=meta(8, 8)), "projection: expected the device of student, cpu, got meta"),
    ],
    ("feature_loss", TypeError): [
        (dict(teacher=[1.0]), r"teacher: expected a tensor \[N, D\], got list"),
        (dict(teacher=GOOD.long()), "teacher: expected float32, .* got torch.int64"),
        (dict(beta=ones(())), "beta: expected a number, got Tensor"),
        (dict(normalize="no"), "normalize: expected a bool, got str"),
        (dict(projection=3), r"projection: expected a tensor \[D, D_student\] .* got int"),
        (
            dict(projection=torch.eye(8).half()),
            "projection: expected the dtype of student, torch.float32, got torch.float16",
        ),
    ],
    ("shaped_attention", ValueError): [
        (dict(q=zeros(2, 5, 12)), r"q: expected a tensor \[B, L, H, K\]"),
        (
            dict(q=zeros(2, 0, 3, 4)),
            r"q: expected \[B, L, H, K\] without an empty dimension, got shape \[2, 0, 3, 4\]",
        ),
        (dict(k=zeros(2, 6, 3, 4)), r"k: expected the shape of q.*\[2, 6, 3, 4\]"),
        (dict(v=meta(2, 5, 3, 4)), "v: expected the device of q, cpu, got meta"),
        (dict(beta=ones(4)), r"beta: expected one value per head, \[3\], got \[4\]"),
        (dict(scale=float("nan")), "scale: expected a finite number, got nan"),
        (
            dict(lengths=torch.tensor([1, 2, 3])),
            r"lengths: expected one per sequence, \[2\], got \[3\]",
        ),
        (dict(lengths=torch.tensor([1, 6])), "lengths: expected 0 to 5 valid tokens, got 6"),
    ],
    ("shaped_attention", TypeError): [
        (dict(v=zeros(2, 5, 3, 4).half()), "v: expected the dtype of q.*float16"),
        (dict(q=zeros(2, 5, 3, 4).int()), "q: expected float32, .* got torch.int32"),
        (dict(gamma=1.0), "gamma: expected a tensor, got float"),
        (dict(scale="1"), "scale: expected a number, got str"),
        (dict(causal="no"), "causal: expected a bool, got str"),
        (dict(lengths=[1, 2]), "lengths: expected an integer tensor"),
        (
            dict(lengths=torch.tensor([1.0, 2.0])),
            "lengths: expected an integer dtype, got torch.float32",
        ),
    ],
    ("parallel_mlp", ValueError): [
        (dict(x=zeros(7, 5)), r"x: expected the width of fc1_weight, 6, .* got shape \[7, 5\]"),
        (dict(x=zeros(0, 6)), "x: expected .* without an empty dimension"),
        (dict(fc1_weight=zeros(6)), r"fc1_weight: expected \[F, C\]"),
        (dict(fc1_bias=zeros(9)), r"fc1_bias: expected \[10\], got shape \[9\]"),
        (dict(fc2_weight=zeros(5, 9)), "fc2_weight: .* F = 10 of fc1_weight"),
        (dict(fc2_bias=meta(5)), "fc2_bias: expected the device of x, cpu, got meta"),
        (dict(act="swish"), "act: expected one of 'gelu', .* got 'swish'"),
    ],
    ("parallel_mlp", TypeError): [
        (dict(x=[1.0]), "x: expected a tensor, got list"),
        (dict(x=zeros(7, 6).int()), "x: expected float32.* got torch.int32"),
        (
            dict(fc2_weight=zeros(5, 10).half()),
            "fc2_weight: expected the dtype of x, .*float32, got .*float16",
        ),
    ],
    ("simplified_block", ValueError): [
        (dict(x=zeros(5, 12)), r"x: expected a tensor \[B, L, C\], got shape \[5, 12\]"),
        (dict(x=zeros(2, 0, 12)), "x: expected .* without an empty dimension"),
        (
            dict(alpha=ones(5)),
            r"alpha: expected one value per head, \[H\] with H a divisor of C = 12, got \[5\]",
        ),
        (dict(beta=ones(4)), r"beta: expected shape \[3\], got \[4\]"),
        (dict(qk_weight=zeros(12, 12)), r"qk_weight: expected shape \[24, 12\], got \[12, 12\]"),
        (dict(norm="batchnorm"), "norm: expected one of 'layernorm', 'rmsnorm', got 'batchnorm'"),
        (dict(norm="rmsnorm"), "norm_bias: expected None, since RMSNorm has no bias, got a tensor"),
        (dict(norm_weight=meta(12)), "norm_weight: expected the device of x, cpu, got meta"),
        (dict(lengths=torch.tensor([6, 1])), "lengths: expected 0 to 5 valid tokens, got 6"),
        (dict(alpha=meta(3)), "alpha: expected the device of x, cpu, got meta"),
        *((dict(eps=eps), f"eps: expected a number above 0, got {eps}") for eps in (0.0, -1e-5)),
    ],
    ("simplified_block", TypeError): [
        (dict(qk_weight=zeros(24, 12).bfloat16()), "qk_weight: expected the dtype of x"),
        (dict(mlp_gain="1"), "mlp_gain: expected a number or a tensor with one element, got str"),
        *(
            (dict.fromkeys([name], "no"), f"{name}: expected a bool, got str")
            for name in ("causal", "recompute")
        ),
        *(
            (
                {name: ones(3 if len(name) < 6 else ()).to(dtype)},
                f"{name}: expected float32, .* got {dtype}",
            )
            for name in ("alpha", "beta", "gamma", "mlp_gain", "attention_gain")
            for dtype in (torch.complex64, torch.bool, torch.int32, torch.float8_e4m3fn)
        ),
    ],
}


@pytest.mark.parametrize(
    ("op", "error", "changes", "message"),
    [
        pytest.param(*key, *case, id=f"{key[0]}: {case[1]}")
        for key, cases in BAD.items()
        for case in cases
    ],
)
def test_bad_input_is_named(op, error, changes, message):
    with pytest.raises(error, match=message):
        getattr(ops, op)(**CALLS[op] | changes)


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
    """Each tensor of a call is named; nested ones, which kernels cannot get, in the first place."""
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
def test_a_teacher_that_requires_a_gradient_is_warned_about_once_and_gets_none(
    op, teacher, monkeypatch
):
    monkeypatch.setattr(checks, "_warned", set())
    student = next(iter(CALLS[op]))
    call = CALLS[op] | (TEACHER if op == "similarity_loss" else {})
    call |= {student: GOOD.clone().requires_grad_(), teacher: GOOD.clone().requires_grad_()}

    def loss(**named):
        out = getattr(ops, op)(**named)
        return out["relational"] if isinstance(out, dict) else out

    with torch.no_grad():
        loss(**call)
    with pytest.warns(
        UserWarning, match=f"{teacher} requires a gradient, but is a constant here and gets none"
    ):
        value = loss(**call)
    loss(**call)
    torch.compiler.reset()  # compilations of other tests count towards the limit of recompilations
    torch.testing.assert_close(
        torch.compile(loss, fullgraph=True, backend="aot_eager")(**call), value
    )
    value.backward()
    assert call[teacher].grad is None
    assert call[student].grad is not None
    assert not loss(
        **call | {student: GOOD, "text" if op == "similarity_loss" else student: GOOD}
    ).requires_grad


@needs_cpu_kernels
def test_native_ops_refuse_a_layout_that_they_cannot_read():
    h = torch.randn(3, 8)
    weight = torch.randn(4, 8)
    bias = torch.randn(8)[::2]
    out = torch.empty(3, 4)
    native = torch.ops.simplclip.parallel_mlp_fwd_cpu
    with pytest.raises(
        RuntimeError, match=r"bias: expected a contiguous tensor, got strides \[2\]"
    ):
        native(h, weight, bias, "gelu", out, False)
    with pytest.raises(RuntimeError, match="bias: expected the dtype of h"):
        native(h, weight, bias.contiguous().bfloat16(), "gelu", out, False)
    q = torch.randn(2, 5, 3, 4)
    with pytest.raises(
        RuntimeError,
        match=r"k: expected stride 1 in the last dimension, got strides \[1, 2, 10, 30\]",
    ):
        torch.ops.simplclip.shaped_attention_fwd_cpu(
            q, layouts.transposed(q), q, torch.ones(3, 3), None, 0.5, False
        )
    lengths = torch.tensor([3], dtype=torch.int32).expand(2)
    with pytest.raises(RuntimeError, match="lengths: expected a contiguous tensor"):
        torch.ops.simplclip.shaped_attention_fwd_cpu(q, q, q, torch.ones(3, 3), lengths, 0.5, False)
