"""Compares each op on each backend that serves it on a device with float64: the command `simplclip
selftest`.

The rule, for results and gradients: |kernel - float64| <= |plain torch in the same dtype - float64|
+ eps, with eps relative to the largest value of float64's result. Plain torch is the backend
"reference" on the CPU. Sizes are 1, primes, and beside the kernels' tiles. Unwritten memory is NaN,
and rows of tensors lie between NaNs.
"""

from __future__ import annotations

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
    return {
        "image": (n, width),
        "text": (m, width),
        "logit_scale": 50.0,
        "plane_weight": 3.0,
        "plane_bias": -1.0,
    }


def teacher(n: int, m: int, width: int) -> Inputs:
    return {"teacher_image": (n, width), "teacher_text": (m, width), "teacher_scale": 60.0}


def gains(heads: int) -> Inputs:
    return dict.fromkeys(("alpha", "beta", "gamma"), (heads,))


def qkv(*shape: int) -> Inputs:
    return dict.fromkeys("qkv", shape) | gains(shape[2])


def mlp(rows: tuple[int, ...], c: int, f: int) -> Inputs:
    return {
        "x": (*rows, c),
        "fc1_weight": (f, c),
        "fc1_bias": (f,),
        "fc2_weight": (c, f),
        "fc2_bias": (c,),
    }


def block(b: int, length: int, c: int, heads: int) -> Inputs:
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
        names = {
            op: backends.public_name(op)
            for op, row in backends.TABLE.items()
            if self.backend in row
        }
        return {op: name for op, name in names.items() if name in PARTS.get(self.op, (self.op,))}

    def serves(self, inputs: Inputs, device: torch.device) -> bool:
        facts, shape = {}, next(iter(inputs.values()))
        if "alpha" in inputs:
            width = shape[3] if len(shape) == 4 else shape[2] // inputs["alpha"][0]
            facts = {"length": shape[1], "width": width, "lengths": "lengths" in inputs}
        reasons = [
            backends.why_not(op, self.backend, device, self.dtype, **facts) for op in self.parts
        ]
        return self.backend in (COMPILED, "reference") or (bool(reasons) and not any(reasons))


def drawn(inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the tensors of a call in a dtype."""
    g, tensors = torch.Generator().manual_seed(0), {}
    for name, of in inputs.items():
        t = torch.randn(of, generator=g) if isinstance(of, tuple) else torch.tensor(of)
        t = t * t.shape[1] ** -0.5 if name in UNIT else t
        wide = torch.promote_types(dtype, torch.float32) if name in WIDE else dtype
        tensors[name] = t.to(wide) if t.is_floating_point() else t
    return tensors


def spread(t: Tensor) -> Tensor:
    """Returns a view of equal values whose rows lie between NaNs."""
    return (
        t
        if t.dim() < 2
        else t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), math.nan)[..., : t.shape[-1]].copy_(t)
    )


def run(
    function: Callable, tensors: dict[str, Tensor], options: dict[str, Any]
) -> dict[str, Tensor]:
    """Returns results, and gradients as d_NAME."""
    names = [
        name
        for name, t in tensors.items()
        if t.is_floating_point() and not name.startswith("teacher")
    ]
    leaves = {name: t.detach().requires_grad_(name in names) for name, t in tensors.items()}
    arguments: dict[str, Any] = leaves | options
    if "plane_bias" in leaves:
        arguments["plane"] = arguments.pop("plane_weight"), arguments.pop("plane_bias")
    out, g = function(**arguments), torch.Generator().manual_seed(1)
    results = out if isinstance(out, dict) else {"out": out}
    incoming = [
        (torch.randn(t.shape, generator=g) if t.dim() else torch.tensor(LOSS_SCALE)).to(t)
        for t in results.values()
    ]
    gradients = torch.autograd.grad(
        list(results.values()), [leaves[name] for name in names], incoming
    )
    return {name: t.detach() for name, t in results.items()} | {
        f"d_{name}": d for name, d in zip(names, gradients)
    }


def check(row: Row, inputs: Inputs, options: dict[str, Any], device: torch.device) -> None:
    """Runs a call on the row's backend, and adds its largest error and what is wrong to the row."""
    function, tensors = getattr(ops, row.op), drawn(inputs, row.dtype)
    shapes = {name: list(t.shape) for name, t in tensors.items()}
    with backends.backend("reference"):
        plain = run(function, tensors, options)
        exact = run(
            function,
            {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()},
            options,
        )
    if row.backend == COMPILED:  # on a CPU without inductor, whose code would need a C++ compiler
        function = torch.compile(
            function, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager"
        )
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
    except Exception as error:
        row.failures.append(f"{type(error).__name__}: {error}; {shapes}, {options}")
        return
    finally:
        torch.use_deterministic_algorithms(False)
    tf32 = (
        device.type == "cuda"
        and row.dtype == torch.float32
        and torch.backends.cuda.matmul.fp32_precision == "tf32"
    )
    for name, value in results.items():
        ours, of_plain = (
            (t.double() - exact[name]).abs().max().item() for t in (value, plain[name])
        )
        allowed = of_plain + (EPS_TF32 if tf32 else EPS[row.dtype]) * max(
            exact[name].abs().max().item(), LEAST
        )
        # JSON has no infinity
        row.worst = max(row.worst, 1e9 if math.isnan(ours) else min(ours / allowed, 1e9))
        if not ours <= allowed:
            row.failures.append(
                f"{name}: error {ours:.2e}, allowed {allowed:.2e}; {shapes}, {options}"
            )


def rows(device: torch.device, names: Iterable[str] | None = None) -> Iterator[Row]:
    """Checks ops (by default all) on the backends that serve them on the device, and yields the
    rows.
    """
    for op in CALLS if names is None else names:
        for row in (
            Row(op, backend, dtype) for backend in (*backends.NAMES, COMPILED) for dtype in EPS
        ):
            served = [call for call in CALLS[op] if row.serves(call[0], device)]
            if row.backend == COMPILED:
                served = served[: row.dtype == torch.float32]
            for call in served:
                check(row, *call, device)
            if served:
                yield row
