"""Launches of the library's own launchers, executed by the machine: a stand-in for Triton's driver,
and no GPU.

    with ptx.card(86) as machine:
        similarity_loss(image, text, scale)  # tensors on the CPU

Triton specialises and compiles for the card what the launchers give it, up to PTX. The machine runs
it on copies of the tensors and writes back what it stored. A hazard raises AssertionError.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction

from ptx.machine import Code, Launch, Machine, Variant
from ptx.parse import parse
from simplclip.kernels import runtime as launching
from simplclip.ops import backends, registry
from simplclip.ops.similarity import op, sweeps

PROCESSORS = {80: 108, 86: 82, 89: 128, 90: 132, 120: 170}
# bytes of a program at most
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
CACHE = 6 << 20  # bytes of the L2 cache, an RTX 3090's
CUDA = torch.device("cuda")


@dataclass
class Started:
    """A launch as the library started it: the kernel, and its arguments by their names."""

    name: str
    arguments: dict[str, Any]
    launch: Launch
    before: dict[str, Tensor]  # copies of tensors, if `Card.compare` is set
    parameters: list[str]  # the arguments that are parameters of the compiled kernel


@dataclass
class Card(Machine):
    """compare(started): called after each launch, with copies of the arguments before it.

    variant: changes each kernel before it runs.
    """

    sm: int = 86
    variant: Variant | None = None
    compare: Callable[[Started], None] | None = None
    launches: int = 0
    functions: set[JITFunction] = field(default_factory=set)  # whose kernels were started

    def __post_init__(self) -> None:
        self.shared_limit = SHARED[self.sm]

    @property
    def device(self) -> Hashable:
        """Triton's name of it: each has compiled kernels of its own."""
        return self.sm, self.variant

    def start(self, code: Code, metadata: Any, programs: int, source: Any, values: tuple) -> None:
        self.functions.add(source.fn)
        arguments = dict(zip(source.fn.arg_names, values))
        flat = list(_flat(source.signature.values(), values))
        before = {}
        if self.compare:
            before = {name: t.clone() for name, t in arguments.items() if isinstance(t, Tensor)}
        launch = self.launch(code, programs, metadata.num_warps * 32, metadata.shared, flat)
        self.launches += 1
        if self.compare:
            parameters = [name for name, kind in source.signature.items() if kind != "constexpr"]
            self.compare(Started(source.name, arguments, launch, before, parameters))

    def forget(self) -> None:
        """Drops the compiled forms of the kernels that were started here; each takes megabytes."""
        for function in self.functions:
            kernels, *_ = function.device_caches.pop(self.device)
            for kernel in kernels.values():
                kernel.module = None  # of which a destructor would tell the driver
        self.functions.clear()

    def execute(self, launch: Launch) -> None:
        super().execute(launch)
        assert not self.hazards, "\n".join(map(str, self.hazards.values()))


_NUMBERS = {
    "fp32": np.float32,
    "i32": np.int32,
    "i64": np.int64,
    "u32": np.uint32,
    "u64": np.uint64,
    "i1": np.int8,
}


def _flat(kinds: Any, values: Any) -> Iterator[Any]:
    """Yields the arguments that the kernel takes at run time: tensors, None and numpy's numbers."""
    for kind, value in zip(kinds, values, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(kind, value)
        elif kind.startswith("*"):
            yield value
        elif kind != "constexpr":
            yield _NUMBERS[kind](value)


class Launcher:
    """What Triton calls to start a kernel on the card of the driver that is active."""

    def __init__(self, source: Any, metadata: Any):
        self.source, self.metadata = source, metadata

    def __call__(self, x: int, y: int, z: int, stream: int, code: Code, *others: Any) -> None:
        if x:  # Triton starts nothing for a grid of 0
            triton.runtime.driver.active.card.start(code, self.metadata, x, self.source, others[4:])


class Driver:
    """Triton's driver."""

    def __init__(self, card: Card):
        self.card = card
        self.launcher_cls = Launcher
        self.utils = self

    def get_current_device(self) -> Hashable:
        return self.card.device

    def get_current_stream(self, device: Hashable) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.card.sm, 32)

    def get_device_properties(self, device: Hashable) -> dict[str, int]:
        return {"max_shared_mem": self.card.shared_limit}

    def load_binary(self, name: str, text: bytes, shared: int, device: Hashable) -> tuple:
        """Returns module, function, registers, spills and the most threads."""
        return object(), Code(parse(text.decode())[name], self.card.variant), 0, 0, 1024

    def unload_module(self, module: object) -> None:
        pass


def _without_assembler(*args: Any) -> tuple[str, str] | None:
    """Makes PTX the binary of Triton's compiler; without arguments, returns a key of its cache."""
    if not args:
        return "ptx", "ptx"
    args[1]["cubin"] = lambda text, metadata: text.encode()
    return None


def widening(function: Callable) -> Callable:
    """Returns a product of torch with out_dtype, which torch has on a GPU alone."""

    def product(*args: Any, out_dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        operands = args[-2:] if out_dtype is None else [t.to(out_dtype) for t in args[-2:]]
        return function(*args[:-2], *operands, **options)

    return product


def _as_on_cuda(function: Callable) -> Callable:
    """Returns a function of sizes for tensors on a GPU, called with one on the CPU."""
    return lambda image, *rest, **options: function(
        SimpleNamespace(shape=image.shape, dtype=image.dtype, device=CUDA), *rest, **options
    )


@contextlib.contextmanager
def driven(active: Driver) -> Iterator[None]:
    """Context in which Triton compiles and starts kernels by this driver."""
    driver = triton.runtime.driver
    before = driver._active
    # Triton 3.6 has no key for changed stages: its own cache would have PTX in place of binaries.
    cache = mock.patch.dict(os.environ, TRITON_CACHE_DIR=os.path.join(knobs.cache.dir, "executed"))
    with cache, mock.patch.object(knobs.runtime, "add_stages_inspection_hook", _without_assembler):
        driver.set_active(active)
        try:
            yield
        finally:
            driver._active = before


@contextlib.contextmanager
def _settings(tf32: bool) -> Iterator[None]:
    """Context with products in TF32 or not; new tensors hold NaN, so that unwritten ones show."""
    products = torch.backends.cuda.matmul
    precision, products.fp32_precision = products.fp32_precision, "tf32" if tf32 else "ieee"
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        products.fp32_precision = precision


@contextlib.contextmanager
def card(
    sm: int, *, tf32: bool = False, processors: int | None = None, **options: Any
) -> Iterator[Card]:
    """Context in which CPU tensors are served as by a card of this architecture; the machine runs
    the kernels.

    tf32: products of float32 tensors are computed in TF32. processors: multiprocessors, by default
    those of a real card.
    """
    machine = Card(sm=sm, **options)
    why_not = backends.why_not_kernels
    properties = launching.Card(sm, processors or PROCESSORS[sm], CACHE)

    def serves(served: str, *of_call: Any) -> str | None:
        return why_not("cpu" if served == "cuda" else served, *of_call)

    patches = (
        mock.patch.object(backends, "why_not_kernels", serves),
        mock.patch.object(
            backends, "extension_on_cuda", return_value="the card executes PTX alone"
        ),
        mock.patch.object(backends, "capability", return_value=divmod(sm, 10)),
        mock.patch.object(launching, "card_of", return_value=properties),
        mock.patch.object(sweeps, "computes_in", side_effect=lambda dtype, device: dtype),
        mock.patch.object(op, "sweep_rows", _as_on_cuda(sweeps.sweep_rows)),
        mock.patch.object(torch, "mm", widening(torch.mm)),
        mock.patch.object(torch, "addmm", widening(torch.addmm)),
        _settings(tf32),
        driven(Driver(machine)),
    )
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        registry.forget_calls()
        stack.callback(registry.forget_calls)
        yield machine
