"""Compares each op on each backend that serves it on a device with float64: the command `simplclip
selftest`.

The rule, for results and gradients: |kernel - float64| <= |plain torch in the same dtype - float64|
+ eps, with eps relative to the largest value of float64's result. Plain torch is the backend
"reference" on the CPU. Sizes are 1, primes, and beside the kernels' tiles. Unwritten memory is NaN,
and rows of tensors lie between NaNs.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from simplclip import ops
from simplclip.ops import backends

# Of half types four times the tests' eps: backends round between products, where the reference
# keeps float32.
EPS = {torch.float32: 5e-4, torch.bfloat16: 4e-2, torch.float16: 4e-3}
EPS_TF32 = 2e-3  # of float32 where torch's products may round to TF32
COMPILED = "torch.compile"  # in a row, in place of a backend
# the largest value of a result is taken for at least this: smaller results are cancellations
LEAST = 0.1
# the gradient of a loss, like a GradScaler's, so that half types can hold the gradients of features
LOSS_SCALE = 64.0
# Tensors that are float32 beside half types, and tensors whose rows have about unit length.
WIDE = {"logit_scale", "logit_bias", "teacher_scale", "alpha", "beta", "gamma", "norm_weight"}
UNIT = {"image", "text", "teacher_image", "teacher_text", "qk_weight", "fc1_weight", "fc2_weight"}
# of a call: the shape of a random tensor as a tuple, or the values of a tensor
Inputs = dict[str, Any]


def pairs(n: int, m: int, width: int) -> Inputs:
    """Returns similarity-loss inputs: shapes of image [n, width] and text [m, width], and scalars.

    The scalars are the logit scale and the plane's weight and bias, as in ops.similarity_loss.
    """
    return {
        "image": (n, width),
        "text": (m, width),
        "logit_scale": 50.0,
        "plane_weight": 3.0,
        "plane_bias": -1.0,
    }


def teacher(n: int, m: int, width: int) -> Inputs:
    """Returns a teacher's inputs of a similarity loss: the shapes of its features, and its scale.

    The shapes are [n, width] of images and [m, width] of texts.
    """
    return {"teacher_image": (n, width), "teacher_text": (m, width), "teacher_scale": 60.0}


def gains(heads: int) -> Inputs:
    """Returns the shapes of shaped attention's gains alpha, beta and gamma, one for each head."""
    return dict.fromkeys(("alpha", "beta", "gamma"), (heads,))


def qkv(*shape: int) -> Inputs:
    """Returns the shapes of q, k and v, [B, L, H, K] as given, and of the gains."""
    return dict.fromkeys("qkv", shape) | gains(shape[2])


def mlp(rows: tuple[int, ...], c: int, f: int) -> Inputs:
    """Returns the shapes of ops.parallel_mlp's inputs: x [*rows, c], and weights.

    f: the number of hidden units.
    """
    return {
        "x": (*rows, c),
        "fc1_weight": (f, c),
        "fc1_bias": (f,),
        "fc2_weight": (c, f),
        "fc2_bias": (c,),
    }


def block(b: int, length: int, c: int, heads: int) -> Inputs:
    """Returns the shapes of ops.simplified_block's inputs, of b sequences of `length` tokens.

    c: the width of a token. The MLP has 4 c + 1 hidden units.
    """
    return (
        mlp((b, length), c, 4 * c + 1)
        | gains(heads)
        | {"qk_weight": (2 * c, c), "norm_weight": (c,)}
    )


IDS = [number // 2 for number in range(257)]
SOFTMAX, SIGMOID = ("contrastive", "pair_matching", "relational"), ("sigmoid", "pair_matching")
# op -> calls: inputs and options
CALLS: dict[str, list[tuple[Inputs, dict[str, Any]]]] = {
    "similarity_loss": [
        (pairs(257, 257, 65) | teacher(257, 257, 72) | {"ids": IDS}, {"terms": SOFTMAX}),
        (pairs(67, 67, 33) | {"logit_bias": -5.0, "ids": IDS[:67]}, {"terms": SIGMOID}),
        (
            pairs(131, 200, 48) | {"logit_bias": -5.0},
            {"terms": ("contrastive", *SIGMOID), "label_offset": 69},
        ),
        (pairs(1, 5, 8) | teacher(1, 5, 8), {"terms": SOFTMAX, "label_offset": 4}),
    ],
    "shaped_attention": [
        (qkv(3, 77, 2, 64), {"causal": True}),
        (qkv(3, 50, 2, 16) | {"lengths": [50, 0, 7]}, {}),
        (qkv(2, 197, 1, 32) | {"lengths": [197, 3]}, {"causal": True}),
        (qkv(1, 1, 1, 1), {}),
    ],
    "parallel_mlp": [
        (mlp((67,), 33, 127), {}),
        (mlp((130,), 24, 1000), {"act": "quickgelu"}),
        (mlp((1,), 1, 1), {"act": "silu"}),
    ],
    "simplified_block": [
        (block(2, 77, 128, 2) | {"lengths": [77, 30]}, {"causal": True}),
        (block(3, 8, 48, 3), {"recompute": True}),
    ],
    "feature_loss": [
        ({"student": (301, 65), "teacher": (301, 65)}, {}),
        (
            {"student": (31, 513), "teacher": (31, 513)},
            {"distance": "smooth_l1", "normalize": False},
        ),
    ],
}
# ops that are composed of others
PARTS = {"simplified_block": ("shaped_attention", "parallel_mlp")}


@dataclass
class Row:
    """The calls of an op on a backend in a dtype."""

    op: str
    backend: str
    dtype: torch.dtype
    calls: int = 0
    worst: float = 0.0  # error in units of the tolerance
    failures: list[str] = field(default_factory=list)

    @property
    def parts(self) -> dict[str, str]:
        """The ops in the table of backends that the row's backend runs, and their public names."""
        parts = {}
        for op, served in backends.TABLE.items():
            name = backends.public_name(op)
            if self.backend in served and name in PARTS.get(self.op, (self.op,)):
                parts[op] = name
        return parts

    def serves(self, inputs: Inputs, device: torch.device) -> bool:
        """Whether the row's backend runs a call with these inputs, in its dtype, on the device.

        torch.compile and the reference always do.
        """
        if self.backend in (COMPILED, "reference"):
            return True
        facts = backends.NO_FACTS
        if "alpha" in inputs:  # attention
            shape = next(iter(inputs.values()))  # [B, L, H, K] or [B, L, C]
            heads = inputs["alpha"][0]
            width = shape[3] if len(shape) == 4 else shape[2] // heads
            facts = backends.Facts(shape[1], width, "lengths" in inputs)
        reasons = [
            backends.why_not(op, self.backend, device, self.dtype, facts) for op in self.parts
        ]
        return bool(reasons) and not any(reasons)


def drawn(inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the tensors of a call on the CPU, name -> tensor, from shapes or values.

    Shapes become normal numbers, the same in each call; rows of tensors in UNIT have about unit
    length. They have `dtype`, those in WIDE at least float32, integers int64.
    """
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    tensors = {}
    for name, value in inputs.items():
        if isinstance(value, tuple):
            t = torch.randn(value, generator=generator)
        else:
            t = torch.tensor(value)
        if name in UNIT:
            t = t * t.shape[1] ** -0.5
        if t.is_floating_point():
            t = t.to(wide if name in WIDE else dtype)
        tensors[name] = t
    return tensors


def spread(t: Tensor) -> Tensor:
    """Returns a view of equal values whose rows lie between NaNs, in new memory.

    A tensor of fewer than two dimensions is returned as it is.
    """
    if t.dim() < 2:
        return t
    *sizes, width = t.shape
    padded = t.new_full((*sizes, 2 * width + 1), math.nan)
    return padded[..., :width].copy_(t)


def run(
    function: Callable, tensors: dict[str, Tensor], options: dict[str, Any]
) -> dict[str, Tensor]:
    """Calls an op and its backward; returns its results by name, and its gradients as d_NAME.

    function: the op. tensors, options: its keyword arguments; gradients are of floating-point
    tensors but the teacher's. A result that is no dict is named "out". The incoming gradients are
    LOSS_SCALE for scalars, else normal numbers, the same in each call.
    """
    names = [
        name
        for name, t in tensors.items()
        if t.is_floating_point() and not name.startswith("teacher")
    ]
    leaves = {name: t.detach().requires_grad_(name in names) for name, t in tensors.items()}
    arguments: dict[str, Any] = leaves | options
    if "plane_bias" in leaves:
        arguments["plane"] = arguments.pop("plane_weight"), arguments.pop("plane_bias")
    results = function(**arguments)
    if not isinstance(results, dict):
        results = {"out": results}
    generator = torch.Generator().manual_seed(1)
    incoming = []
    for t in results.values():
        gradient = torch.tensor(LOSS_SCALE)
        if t.dim():
            gradient = torch.randn(t.shape, generator=generator)
        incoming.append(gradient.to(t))
    gradients = torch.autograd.grad(
        list(results.values()), [leaves[name] for name in names], incoming
    )
    values = {name: t.detach() for name, t in results.items()}
    return values | {f"d_{name}": gradient for name, gradient in zip(names, gradients)}


def check(row: Row, inputs: Inputs, options: dict[str, Any], device: torch.device) -> None:
    """Runs a call on the row's backend; adds its largest error and what is wrong to `row`.

    inputs, options: of the call, as in CALLS. Errors that the call raises count as failures. Turns
    torch's deterministic algorithms on meanwhile, and off at the end.
    """
    function = getattr(ops, row.op)
    tensors = drawn(inputs, row.dtype)
    shapes = {name: list(t.shape) for name, t in tensors.items()}
    call = f"{shapes}, {options}"
    doubles = dict(tensors)
    for name, t in tensors.items():
        if t.is_floating_point():
            doubles[name] = t.double()
    with backends.backend("reference"):
        plain = run(function, tensors, options)
        exact = run(function, doubles, options)
    if row.backend == COMPILED:  # on a CPU without inductor, whose code would need a C++ compiler
        compiler = "inductor" if device.type == "cuda" else "aot_eager"
        function = torch.compile(function, fullgraph=True, backend=compiler)
    row.calls += 1
    torch.use_deterministic_algorithms(True, warn_only=True)  # unwritten memory is NaN
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            backends.backend(**dict.fromkeys(row.parts.values(), row.backend)),
        ):
            results = run(
                function, {name: spread(t.to(device)) for name, t in tensors.items()}, options
            )
            results = {name: t.cpu() for name, t in results.items()}
    except Exception as failure:
        row.failures.append(f"{type(failure).__name__}: {failure}; {call}")
        return
    finally:
        torch.use_deterministic_algorithms(False)
    eps = _eps(row.dtype, device)
    for name, value in results.items():
        error = (value.double() - exact[name]).abs().max().item()
        plain_error = (plain[name].double() - exact[name]).abs().max().item()
        allowed = plain_error + eps * max(exact[name].abs().max().item(), LEAST)
        share = 1e9  # JSON has no infinity
        if not math.isnan(error):
            share = min(error / allowed, 1e9)
        row.worst = max(row.worst, share)
        if not error <= allowed:
            row.failures.append(f"{name}: error {error:.2e}, allowed {allowed:.2e}; {call}")


def _eps(dtype: torch.dtype, device: torch.device) -> float:
    """Returns the tolerance of a dtype, relative to the largest value; more where TF32 is used."""
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    if device.type == "cuda" and dtype == torch.float32 and tf32:
        return EPS_TF32
    return EPS[dtype]


def check_ops(device: torch.device, names: Iterable[str] | None = None) -> Iterator[Row]:
    """Checks ops on the backends that serve them on the device, and yields the rows.

    There is one Row for each op, backend and dtype, yielded when its calls have run. names: ops,
    keys of CALLS; None: all.
    """
    for op in CALLS if names is None else names:
        for backend, dtype in itertools.product((*backends.NAMES, COMPILED), EPS):
            row = Row(op, backend, dtype)
            calls = [call for call in CALLS[op] if row.serves(call[0], device)]
            if backend == COMPILED:  # which takes seconds: one call
                calls = calls[:1] if dtype == torch.float32 else []
            for inputs, options in calls:
                check(row, inputs, options, device)
            if calls:
                yield row
