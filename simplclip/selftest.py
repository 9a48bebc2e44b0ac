"""Compares each op on each backend that serves it on a device with float64: the command `simplclip selftest`.

The rule, for results and gradients: |kernel - float64| <= |plain torch in the same dtype - float64| + eps, with eps relative
to the largest value of float64's result. Plain torch is the backend "reference" on the CPU. Sizes are 1, primes, and beside
the kernels' tiles. Unwritten memory is NaN, and rows of tensors lie between NaNs.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from simplclip import ops
from simplclip.ops import backends

EPS = {"float32": 5e-4, "tf32": 2e-3, "bfloat16": 1e-2, "float16": 1e-3}
COMPILED = "torch.compile"  # in a row, in place of a backend
PARTS = {"simplified_block": ("shaped_attention", "parallel_mlp")}  # ops that are composed of others
LEAST = 0.1  # the largest value of a result is taken for at least this: smaller results are cancellations
LOSS_SCALE = 64.0  # the gradient of a loss, like a GradScaler's, so that half types can hold the gradients of features
WIDE = {"logit_scale", "logit_bias", "teacher_scale", "alpha", "beta", "gamma", "norm_weight"}  # float32 beside half types


@dataclass
class Row:
    """The calls of an op on a backend in a precision."""

    op: str
    backend: str
    precision: str
    calls: int = 0
    worst: float = 0.0  # error in units of the tolerance
    failures: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.precision == "tf32" else getattr(torch, self.precision)

    @property
    def parts(self) -> dict[str, str]:
        """The ops in the table of backends that the row's backend runs, and their public names."""
        names = {op: backends.public_name(op) for op, row in backends.TABLE.items() if self.backend in row}
        return {op: name for op, name in names.items() if name in PARTS.get(self.op, (self.op,))}


@dataclass
class Call:
    op: str
    tensors: dict[str, Tensor]  # float64, or int64
    options: dict[str, Any]

    def __str__(self) -> str:
        return f"{', '.join(f'{name} {list(t.shape)}' for name, t in self.tensors.items())}; {self.options}"

    def served_by(self, row: Row, device: torch.device) -> bool:
        facts = {}
        if "alpha" in self.tensors:
            _, length, *width = next(iter(self.tensors.values())).shape  # of x, or of q
            head = width[1] if len(width) == 2 else width[0] // len(self.tensors["alpha"])
            facts = {"length": length, "width": head, "lengths": "lengths" in self.tensors}
        reasons = [backends.why_not(op, row.backend, device, row.dtype, **facts) for op in row.parts]
        return row.backend in (COMPILED, "reference") or (bool(reasons) and not any(reasons))


def calls() -> list[Call]:
    g = torch.Generator().manual_seed(0)

    def draw(name: str, of: Any) -> Tensor:
        """Returns a tensor of a shape (a tuple), or of a value."""
        if not isinstance(of, tuple):
            return torch.tensor(of, dtype=torch.float64 if isinstance(of, float) else torch.int64)
        t = torch.randn(of, generator=g, dtype=torch.float64)
        return t * of[1] ** -0.5 if name.endswith(("image", "text", "weight")) and len(of) == 2 else t

    def call(op: str, tensors: dict[str, Any], **options: Any) -> Call:
        return Call(op, {name: draw(name, of) for name, of in tensors.items() if of is not None}, options)

    def similarity(n: int, m: int, width: int, *terms: str) -> Call:
        tensors = {"image": (n, width), "text": (m, width), "logit_scale": 50.0, "plane_weight": 3.0, "plane_bias": -1.0}
        if "sigmoid" in terms:
            tensors["logit_bias"] = -5.0
        if "relational" in terms:
            tensors |= {"teacher_image": (n, width + 7), "teacher_text": (m, width + 7), "teacher_scale": 60.0}
        tensors["ids"] = [number // 2 for number in range(n)] if n == m else None
        return call("similarity_loss", tensors, terms=terms, label_offset=m - n)

    def gains(heads: int, lengths: list[int] | None) -> dict[str, Any]:
        return {"alpha": (heads,), "beta": (heads,), "gamma": (heads,), "lengths": lengths}

    def attention(b: int, length: int, heads: int, width: int, lengths: list[int] | None = None) -> Call:
        tensors = dict.fromkeys("qkv", (b, length, heads, width)) | gains(heads, lengths)
        return call("shaped_attention", tensors, causal=length % 2 == 1)

    def layers(c: int, f: int) -> dict[str, Any]:
        return {"fc1_weight": (f, c), "fc1_bias": (f,), "fc2_weight": (c, f), "fc2_bias": (c,)}

    def block(b: int, length: int, c: int, heads: int, lengths: list[int] | None = None, **options: Any) -> Call:
        tensors = {"x": (b, length, c), "qk_weight": (2 * c, c), "norm_weight": (c,)}
        return call("simplified_block", tensors | layers(c, 4 * c + 1) | gains(heads, lengths), causal=True, **options)

    def feature(n: int, width: int, **options: Any) -> Call:
        return call("feature_loss", {"student": (n, width), "teacher": (n, width)}, **options)

    return [
        similarity(257, 257, 65, "contrastive", "pair_matching", "relational"),
        similarity(67, 67, 33, "sigmoid", "pair_matching"),
        similarity(131, 200, 48, "contrastive", "pair_matching", "sigmoid"),
        similarity(1, 5, 8, "contrastive", "pair_matching", "relational"),
        *(attention(3, 77, 2, 64), attention(3, 50, 2, 16, [50, 0, 7]), attention(1, 1, 1, 1), attention(2, 197, 1, 32, [197, 3])),
        call("parallel_mlp", {"x": (67, 33)} | layers(33, 127)),
        call("parallel_mlp", {"x": (1, 1)} | layers(1, 1), act="silu"),
        call("parallel_mlp", {"x": (1301, 8)} | layers(8, 4096), act="quickgelu"),
        *(block(2, 77, 128, 2, [77, 30]), block(3, 8, 48, 3, recompute=True)),
        *(feature(301, 65), feature(31, 513, distance="smooth_l1", normalize=False), feature(1, 3)),
    ]


def spread(t: Tensor) -> Tensor:
    """Returns a view of equal values; rows of floating point lie between NaNs."""
    if t.dim() < 2:
        return t
    return t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), math.nan)[..., : t.shape[-1]].copy_(t)


def run(function: Callable, call: Call, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns results, and gradients as d_NAME."""
    names = [name for name, t in tensors.items() if t.is_floating_point() and not name.startswith("teacher")]
    leaves = {name: t.detach().requires_grad_(name in names) for name, t in tensors.items()}
    arguments: dict[str, Any] = leaves | call.options
    if "plane_bias" in leaves:
        arguments["plane"] = arguments.pop("plane_weight"), arguments.pop("plane_bias")
    out, g = function(**arguments), torch.Generator().manual_seed(1)
    results = out if isinstance(out, dict) else {"out": out}
    incoming = [(torch.randn(t.shape, generator=g) if t.dim() else torch.tensor(LOSS_SCALE)).to(t) for t in results.values()]
    gradients = torch.autograd.grad(list(results.values()), [leaves[name] for name in names], incoming)
    return {name: t.detach() for name, t in results.items()} | {f"d_{name}": d for name, d in zip(names, gradients)}


@contextlib.contextmanager
def settings(row: Row) -> Iterator[None]:
    """Context in which the row's backend is forced, float32 is TF32 if the row says so, and unwritten memory is NaN."""
    before = torch.backends.cuda.matmul.fp32_precision
    with warnings.catch_warnings(), backends.backend(**dict.fromkeys(row.parts.values(), row.backend)):
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cuda.matmul.fp32_precision = "tf32" if row.precision == "tf32" else "ieee"
        try:
            yield
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
            torch.use_deterministic_algorithms(False)


def check(row: Row, call: Call, device: torch.device) -> None:
    """Runs a call on the row's backend, and adds its largest error and what is wrong to the row."""
    wide, function = torch.promote_types(row.dtype, torch.float32), getattr(ops, call.op)
    dtypes = {name: wide if name in WIDE else row.dtype for name in call.tensors}
    typed = {name: t.to(dtypes[name]) if t.is_floating_point() else t for name, t in call.tensors.items()}
    with backends.backend("reference"):
        plain = run(function, call, typed)
        exact = run(function, call, {name: t.double() if t.is_floating_point() else t for name, t in typed.items()})
    if row.backend == COMPILED:  # on a CPU without inductor, whose code would need a C++ compiler
        function = torch.compile(function, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    row.calls += 1
    try:
        with settings(row):
            results = run(function, call, {name: spread(t.to(device)) for name, t in typed.items()})
    except Exception as error:
        row.failures.append(f"{type(error).__name__}: {error}; {call}")
        return
    for name, value in results.items():
        error, of_plain = ((t.cpu().double() - exact[name]).abs().max().item() for t in (value, plain[name]))
        allowed = of_plain + EPS[row.precision] * max(exact[name].abs().max().item(), LEAST)
        row.worst = max(row.worst, math.inf if math.isnan(error) else error / allowed)
        if not error <= allowed:
            row.failures.append(f"{name}: error {error:.2e}, allowed {allowed:.2e}; {call}")


def rows(device: torch.device, ops_to_check: Iterable[str] = ops.__all__) -> Iterator[Row]:
    """Checks ops on all backends that serve them on the device; yields what it found row by row."""
    for op in ops_to_check:
        for row in (Row(op, backend, precision) for backend in (*backends.NAMES, COMPILED) for precision in EPS):
            if row.precision == "tf32" and not (device.type == "cuda" and row.backend in ("cuda", "triton")):
                continue
            with settings(row):  # CUDA attention serves float32 as TF32
                served = [call for call in calls() if call.op == op and call.served_by(row, device)]
            for call in served if row.backend != COMPILED else served[: row.precision == "float32"]:
                check(row, call, device)
            if row.calls:
                yield row
