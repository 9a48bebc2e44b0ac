"""The addresses that Triton kernels read and write, at sizes that no interpreter could compute.

A call runs on fake CUDA tensors, which have no memory, with a card's tiles. Triton's interpreter runs some programs of the
call's launches. Each tensor gets a range of addresses, far from other ranges; every load and store must lie in a range.
An index that overflows 32 bits leaves its range, since no tensor here has 2^32 elements. A load gives zeros.

    python tests/support/addresses.py NAME:DTYPE:CARD...      prints a line for each call, then the errors
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # while kernels are defined; the launchers run as on a card
import triton  # noqa: F401
from triton.runtime import interpreter

import simplclip.kernels.attention.op
import simplclip.kernels.mlp.op
import simplclip.kernels.similarity.forward
import simplclip.kernels.similarity.op
import simplclip.kernels.similarity.sigmoid

del os.environ["TRITON_INTERPRET"]

import dataclasses
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from unittest import mock

import numpy as np
import torch

from benchmarks.cards import calls
from benchmarks.cards.bound import on_card
from simplclip.plan.cards import CARDS
from simplclip.plan.kernels import Kernel, Launch, Stand

APART = 46  # log2 of the bytes from one tensor to the next: an index of 32 bits cannot be wrong by so much
_REAL = interpreter._interpreter


class Address:
    """A stand-in for a tensor, which the interpreter accepts as one."""

    def __init__(self, stand: Stand):
        self.dtype, self._address = stand.dtype, (stand.storage + 1 << APART) + stand.data_ptr()

    def data_ptr(self) -> int:
        return self._address


class Executor(interpreter.GridExecutor):
    """An executor that runs a kernel on the addresses themselves, not on copies of tensors."""

    def _init_args_hst(self, args, kwargs):
        return args, kwargs

    def _restore_args_dev(self, *_):
        pass


def ends(*arguments: int) -> list[int]:
    """Replaces range in loops whose steps are independent of each other: returns the first two steps and the last."""
    every = range(*map(int, arguments))
    return [*every[:2], every[-1]] if len(every) > 3 else list(every)


class Audit:
    """A stand-in for the interpreter's memory, which checks addresses."""

    def __init__(self):
        self.sizes: dict[int, int] = {}  # number of a tensor's storage, from 1 -> its bytes
        self.programs = self.addresses = 0
        self.wrong: list[str] = []

    def __getattr__(self, name):
        return getattr(_REAL, name)

    def argument(self, value):
        if isinstance(value, Stand):
            self.sizes[value.storage + 1] = value.allocated
            return Address(value)
        if dataclasses.is_dataclass(value) and hasattr(value, "INTERPRETED"):
            return dataclasses.replace(value, INTERPRETED=True)
        return type(value)(*map(self.argument, value)) if isinstance(value, tuple) else value

    def run(self, launch: Launch) -> None:
        """Runs the first and the last program of a launch."""
        (count,), builder = launch.grid, interpreter.interpreter_builder
        args = [self.argument(value) for value in launch.args]
        options = {name: name == "INTERPRETED" or self.argument(value) for name, value in launch.options.items()}
        grid, place, self.kernel = builder.set_grid_dim, builder.set_grid_idx, launch.kernel.fn.__name__
        for program in sorted({0, count - 1}):
            with (
                mock.patch.object(builder, "set_grid_dim", lambda *_, count=count: grid(count, 1, 1)),
                mock.patch.object(builder, "set_grid_idx", lambda *_, program=program: place(program, 0, 0)),
                mock.patch.object(interpreter, "_interpreter", self),
                mock.patch.object(simplclip.kernels.attention.op, "range", ends, create=True),
                mock.patch.object(simplclip.kernels.similarity.forward, "range", ends, create=True),
            ):
                Executor(launch.kernel.rewrite(), launch.kernel.arg_names, (1, 1, 1))(*args, **options)
            self.programs += 1

    def check(self, what: str, addresses: np.ndarray, mask: np.ndarray, itemsize: int) -> None:
        used = addresses if mask.all() else addresses[np.broadcast_to(mask, addresses.shape)]
        if not used.size:
            return
        self.addresses += used.size
        low, high, bits = int(used.min()), int(used.max()), int(np.bitwise_or.reduce(used, None))
        number, size = low >> APART, self.sizes.get(low >> APART, 0)
        first, last = (number << APART), (number << APART) + size - itemsize
        if high > last or bits % itemsize:
            self.wrong.append(f"{self.kernel}: {what} of bytes {low - first} to {high - first} of a tensor of {size}")

    def load(self, addresses, mask, other, dtype):
        self.check("load", addresses, mask, np.dtype(dtype).itemsize)
        return np.where(mask, np.zeros(1, dtype), other).astype(dtype)

    def store(self, addresses, values, mask):
        self.check("store", addresses, mask, values.dtype.itemsize)


def sampled(steps: list[Kernel]) -> list[Launch]:
    """Returns the first and the last launch of each kernel and its compiled form."""
    launches_of = defaultdict(list)
    for step in steps:
        if step.by == "triton":
            constants = {name: value for name, value in step.launch.options.items() if name.isupper()}
            launches_of[step.name, repr(constants)].append(step.launch)
    return [launches[i] for launches in launches_of.values() for i in sorted({0, len(launches) - 1})]


LARGE = 131_072, 1024  # N, D
MANY = 1_000_003, 2200  # N D above 2^31, and an odd number of rows
TOKENS = 2, 2_000_003, 16, 80  # B, L, H, K: one sequence has more than 2^31 elements
CHUNKS = {"scratch_bytes": 6 << 30}
CASES: dict[str, Callable[[torch.dtype, bool], None]] = {
    **{name: partial(calls.loss, terms, *LARGE) for name, terms in calls.LOSSES.items()},
    "many": partial(calls.loss, ("contrastive",), *MANY, **CHUNKS),
    "many sigmoid": partial(calls.loss, ("sigmoid",), *MANY, **CHUNKS),
    "attention": partial(calls.attention, TOKENS, False),
    "attention causal": partial(calls.attention, TOKENS, True),
    "mlp": partial(calls.mlp, (1, 1_000_003, 768, 3072)),
}


def audit(name: str, dtype: torch.dtype, card: str) -> Audit:
    with on_card(CARDS[card]) as kernels:
        CASES[name](dtype, True)
    result = Audit()
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        for launch in sampled(kernels):
            result.run(launch)
    return result


if __name__ == "__main__":
    for case in sys.argv[1:]:
        name, dtype, card = case.split(":")
        result = audit(name, getattr(torch, dtype), card)
        lines = [f"{case}: {result.programs} programs, {result.addresses} addresses", *dict.fromkeys(result.wrong)]
        print(*lines, sep="\n    ", flush=True)
