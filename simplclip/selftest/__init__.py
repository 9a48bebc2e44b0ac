"""Compares each op on each backend that serves it on a device with float64: the command `simplclip
selftest`.

Plain torch is the backend "reference" on the CPU. Unwritten memory is NaN, and rows of tensors lie
between NaNs.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from simplclip import ops
from simplclip.ops import backends
from simplclip.selftest.calls import CALLS, Call
from simplclip.selftest.compare import Case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COMPILED = "torch.compile"  # in a row, in place of a backend


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
    def parts(self) -> list[str]:
        """The ops in the table of backends that the row's backend runs."""
        parts = backends.PARTS.get(self.op, (self.op,))
        return [op for op in parts if self.backend in backends.TABLE.get(op, ())]

    def serves(self, call: Call, device: torch.device) -> bool:
        """Whether the row's backend runs a call in the row's dtype on the device.

        torch.compile and the reference always do.
        """
        if self.backend in (COMPILED, "reference"):
            return True
        facts = backends.NO_FACTS
        if "alpha" in call.tensors:  # attention
            first = next(iter(call.tensors.values()))  # [B, L, H, K] or [B, L, C]
            width = first[0, 0].numel() // len(call.tensors["alpha"])
            facts = backends.Facts(first.shape[1], width, "lengths" in call.tensors)
        reasons = [
            backends.why_not(op, self.backend, device, self.dtype, facts) for op in self.parts
        ]
        return bool(reasons) and not any(reasons)


def check(row: Row, call: Call, device: torch.device) -> None:
    """Runs a call on the row's backend; adds its largest error and what is wrong to `row`."""
    forced = dict.fromkeys(row.parts, row.backend)
    tf32 = (
        device.type == "cuda"
        and row.dtype == torch.float32
        and torch.backends.cuda.matmul.fp32_precision == "tf32"
    )
    case = Case(call, row.dtype, forced, call.needed(), device=device, tf32=tf32)
    function: Callable = getattr(ops, call.op)
    if row.backend == COMPILED:  # on a CPU without inductor, whose code would need a C++ compiler
        compiler = "inductor" if device.type == "cuda" else "aot_eager"
        function = torch.compile(function, fullgraph=True, backend=compiler)
    row.calls += 1
    torch.use_deterministic_algorithms(True, warn_only=True)  # unwritten memory is NaN
    try:
        with warnings.catch_warnings(action="ignore"):
            results = case.run(function)
            results = {name: t.cpu() for name, t in results.items()}
    except Exception as failure:
        row.failures.append(f"{type(failure).__name__}: {failure}; {call}")
        return
    finally:
        torch.use_deterministic_algorithms(False)
    for error in case.errors(results):
        row.worst = max(row.worst, error.share)
        if not error.right:
            row.failures.append(f"{error}; {call}")


def check_ops(device: torch.device, names: Iterable[str] | None = None) -> Iterator[Row]:
    """Yields a Row for each op, backend and dtype. names: keys of CALLS; None: all."""
    for op in CALLS if names is None else names:
        every = [make() for make in CALLS[op]]
        for backend, dtype in itertools.product((*backends.NAMES, COMPILED), DTYPES):
            row = Row(op, backend, dtype)
            calls = [call for call in every if row.serves(call, device)]
            if backend == COMPILED:  # which takes seconds: one call
                calls = calls[:1] if dtype == torch.float32 else []
            for call in calls:
                check(row, call, device)
            if calls:
                yield row
