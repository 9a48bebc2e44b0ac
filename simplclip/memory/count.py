"""Counts the memory that a step on fake tensors would allocate: live bytes by kind after every event, and the peak."""

from __future__ import annotations

import weakref
from collections import Counter as Bag
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simplclip.common.errors import UserError
from simplclip.kernels import launch as launching
from simplclip.memory.workspaces import packing_bytes, workspace_bytes
from simplclip.ops import registry

# The kinds of live bytes. A storage has the kind of the phase that allocated it, until `hold` changes it.
WORKSPACE = "kernel workspaces"
KINDS = ("parameters", "gradients", "optimizer state", "batch", "activations", "loss", "temporaries", WORKSPACE)
GPU_BLOCK = 512  # torch's CUDA allocator allocates multiples of it


class UncountedOp(UserError, RuntimeError):
    """The memory of an op cannot be predicted: it has no fake implementation, or its results depend on values."""


# Errors of ops without a fake implementation, and of ops whose results depend on values.
_NOT_FAKE = (
    NotImplementedError,
    fake_tensor.UnsupportedOperatorException,
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
)

# Products for which oneDNN allocates memory from torch's CPU allocator -> their operands among the arguments.
_PRODUCTS = {
    torch.ops.aten.mm.default: lambda args: args[:2],
    torch.ops.aten.addmm.default: lambda args: args[1:3],
    torch.ops.aten.addmm_.default: lambda args: args[1:3],
}


def _packing(a: Tensor, b: Tensor) -> int:
    return packing_bytes(a.shape[0], b.shape[1], a.shape[1], a.dtype, transposed=a.stride(1) != 1)


@dataclass
class Usage:
    """Live bytes by kind over the events of a step."""

    phases: list[tuple[int, str]] = field(default_factory=list)  # first event, name
    events: list[tuple[str, int]] = field(default_factory=list)  # kind, change in bytes
    peak: int = 0
    at_peak: dict[str, int] = field(default_factory=dict)
    peak_phase: str = ""
    steps: list[int] = field(default_factory=list)  # first event of each step, and the end of the last one

    def timeline(self, points: int = 2000) -> tuple[list[str], list[list[int]], list[tuple[int, str]]]:
        """The last step: kinds, live bytes of each kind at about `points` moments at most, first moments of the phases.

        A moment represents several events, by the live bytes at their highest total.
        """
        start, end = self.steps[-2:]
        live = dict.fromkeys(KINDS, 0)
        for kind, change in self.events[:start]:
            live[kind] += change
        span = max(1, (end - start) // points)
        rows: list[tuple[int, ...]] = []
        for place, (kind, change) in enumerate(self.events[start:end]):
            live[kind] += change
            row = tuple(live.values())
            if place % span == 0:
                rows.append(row)
            elif sum(row) > sum(rows[-1]):
                rows[-1] = row
        used = [index for index in range(len(KINDS)) if any(row[index] for row in rows)]
        phases: list[tuple[int, str]] = []
        for event, name in self.phases:
            if start <= event < end and name and (not phases or phases[-1][1] != name):
                phases.append(((event - start) // span, name))
        return [KINDS[index] for index in used], [[row[index] for row in rows] for index in used], phases


class Counter(TorchDispatchMode):
    """Tracks the storages on `device` that ops return; `usage` is the result.

    Ops of simplclip run on fake tensors; only the functions of their C++ backends, whose allocations are not visible, are
    replaced by their fakes and workspaces.

    Raises UncountedOp or UnknownWorkspace, naming the op, if either is missing.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.usage = device, Usage()
        self.block = GPU_BLOCK if device.type == "cuda" else 1
        self.kind, self.phase = "temporaries", ""
        self.live: Bag[str] = Bag()
        self._total = 0
        self._held: dict[int, tuple[str, int, weakref.ref]] = {}

    @contextmanager
    def during(self, phase: str, kind: str) -> Iterator[None]:
        """Context whose allocations have this kind; `phase` is its name in the timeline."""
        before = self.phase, self.kind
        self._enter(phase, kind)
        try:
            yield
        finally:
            self._enter(*before)

    def _enter(self, phase: str, kind: str) -> None:
        self.phase, self.kind = phase, kind
        self.usage.phases.append((len(self.usage.events), phase))

    def hold(self, tensors: object, kind: str) -> None:
        """Counts the storages of existing tensors, or changes their kind."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device.type:
                self._see(tensor, kind)
                self._relabel(tensor, kind)

    def transient(self, size: int) -> None:
        """Counts an allocation of `size` bytes that is freed at once."""
        self._change(WORKSPACE, size)
        self._change(WORKSPACE, -size)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Context in which the step runs."""
        registry.counted = True
        try:
            with self:
                yield
        finally:
            registry.counted = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        ours = registry.DISPATCH.get(func.name())
        if ours is not None:
            with self:
                return ours(*args, through=self._native)
        try:
            out = func(*args, **(kwargs or {}))
        except _NOT_FAKE as error:
            reason = f"{type(error).__name__} {str(error).strip()}".splitlines()[0]
            raise UncountedOp(
                f"{func.name()}: its memory cannot be predicted, since it does not run on fake tensors: {reason}"
            ) from error
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device.type:
                self._see(tensor, self.kind)
        if self.device.type == "cpu" and func in _PRODUCTS:
            self.transient(_packing(*_PRODUCTS[func](args)))
        return out

    def _native(self, op: str, backend: str, function):
        """Replaces `function` of `backend`. The reference, plain torch, runs unchanged; Triton's launchers run without their
        kernels."""
        if backend == "reference":
            return function

        def fake(*args):
            out = registry.NATIVE_FAKES[op](*args)
            self.transient(workspace_bytes(op, backend, *args))
            return out

        def launch(*args):
            outer = self.kind
            with self.during(self.phase, WORKSPACE), launching.pretended():
                out = function(*args)
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor) and self._kind_of(tensor) == WORKSPACE:
                    self._relabel(tensor, outer)
            return out

        return launch if backend == "triton" else fake

    def _kind_of(self, tensor: Tensor) -> str | None:
        return self._held.get(tensor.untyped_storage()._cdata, (None,))[0]

    def _see(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        size = -(-storage.nbytes() // self.block) * self.block
        gone = weakref.ref(storage, lambda _, key=key: self._free(key))
        self._held[key] = (kind, size, gone)
        self._change(kind, size)

    def _relabel(self, tensor: Tensor, kind: str) -> None:
        key = tensor.untyped_storage()._cdata
        was, size, gone = self._held[key]
        if was != kind:
            self._held[key] = (kind, size, gone)
            self._change(was, -size)
            self._change(kind, size)

    def _free(self, key: int) -> None:
        kind, size, _ = self._held.pop(key)
        self._change(kind, -size)

    def _change(self, kind: str, size: int) -> None:
        if not size:
            return
        self.live[kind] += size
        self._total += size
        usage = self.usage
        usage.events.append((kind, size))
        if self._total > usage.peak:
            usage.peak, usage.at_peak = self._total, {kind: self.live[kind] for kind in KINDS if self.live[kind]}
            usage.peak_phase = self.phase
