"""Counts what a step on fake tensors would do on a device: the bytes that are live by kind, their
peak, and its kernels.

A C++ function also allocates a workspace, which fake tensors do not show; the function itself
computes the size from meta tensors (csrc/scratch.h). Memory of the libraries that it calls is not
counted, mainly oneDNN's copies of bfloat16 operands.
"""

from __future__ import annotations

import itertools
import weakref
from collections import Counter as Bag
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses import fake_tensor as fakes
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from simplclip.common.errors import UserError
from simplclip.kernels import runtime as launching
from simplclip.kernels.similarity import plan as similarity_plan
from simplclip.ops import backends, registry
from simplclip.plan.kernels import (
    ExtensionCall,
    Kernel,
    Launch,
    Stand,
    extension_work,
    kernels_of,
    launch_work,
    started_by,
)

# The kinds of live bytes. `during` gives a storage its kind; `hold` may change it.
WORKSPACE = "kernel workspaces"
WEIGHTS = ("parameters", "averages", "gradients", "optimizer state")
KINDS = (*WEIGHTS, "batch", "activations", "loss", "temporaries", WORKSPACE)


class UncountedOp(UserError, RuntimeError):
    """Error for an op whose memory cannot be predicted: the op has no fake implementation, its
    results depend on values, or its C++ function states no workspace.
    """


# TypeError: before torch 2.15 the fake of the memory-efficient attention's backward lacks an
# argument.
_NO_FAKE = NotImplementedError, fakes.UnsupportedOperatorException, TypeError
_EFFICIENT_BACKWARD = (
    torch.ops.aten._efficient_attention_backward.default if torch.__version__ < "2.15" else None
)
# C++ asks each fake tensor for its device, more often than it calls ops.
_DEVICE = torch.ops.prim.device.default
_has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
_VALUES = fakes.DataDependentOutputException, fakes.DynamicOutputShapeException


@dataclass
class Usage:
    """Live bytes by kind over the events of a step, and its kernels in the order in which they
    start.
    """

    events: list[tuple[str, int]] = field(default_factory=list)  # kind, change in bytes
    peak: int = 0
    at_peak: dict[str, int] = field(default_factory=dict)
    kernels: list[Kernel] = field(default_factory=list)


class Counter(TorchDispatchMode):
    """A mode that counts the storages on `device` that ops return, and the kernels that they start;
    `usage` is the result.

    Ops of simplclip run on fake tensors too. A C++ function is not called: its results are made as
    fake tensors, and the workspace that the function states is counted. A Triton launcher runs, but
    starts no kernel. Other backends are torch.

    waits: whether values of tensors may be read, as 0, so that the host's waits for them are
    counted.

    Raises UncountedOp, which names the op.
    """

    def __init__(self, device: torch.device, waits: bool = False) -> None:
        """Makes a mode that counts nothing yet; device need not exist."""
        super().__init__()
        self.device = device
        self.waits = waits
        # as which the value of a tensor is read; None: an error
        self.value: float | None = 0.0 if waits else None
        self.usage = Usage()
        self.times = 1  # the number of runs for which the next kernels count
        # ops that are no compositions: name, and whether it starts a kernel
        self._leaf_ops: dict[OpOverload, tuple[str, bool]] = {}
        # torch's allocator rounds sizes up to multiples of this
        self.block = 512 if device.type == "cuda" else 1
        self.kind = "temporaries"
        self.live: Bag[str] = Bag()
        self._held: dict[int, tuple[str, int, weakref.ref]] = {}
        self._numbers: dict[int, tuple[int, weakref.ref]] = {}
        self._next = itertools.count()

    @contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """Context in which the storages that ops return are counted as `kind`, one of KINDS."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def hold(self, tensors: object, kind: str, instead_of: Container[str] = KINDS) -> None:
        """Counts the storages of `tensors` on the device as `kind`, from now until they are freed.

        tensors: a tensor or a nest of lists, tuples and dicts of them. instead_of: a storage that
        is counted already as one of these kinds changes to `kind`; as any other, it stays.
        """
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, Tensor) or tensor.device.type != self.device.type:
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._held:
                size = -(-storage.nbytes() // self.block) * self.block
                self._held[key] = kind, size, weakref.ref(storage, partial(self._free, key))
                self._change(kind, size)
            elif (before := self._held[key][0]) in instead_of and before != kind:
                _, size, reference = self._held[key]
                self._held[key] = kind, size, reference
                self._change(before, -size)
                self._change(kind, size)

    def count_workspace(self, size: int) -> None:
        """Counts a kernel's workspace of `size` bytes, which is freed at once."""
        self._change(WORKSPACE, size)
        self._change(WORKSPACE, -size)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Context in which all ops, Triton launches and waits of the host are counted in `usage`.

        Meanwhile Triton kernels do not start, and `tolist` of a fake tensor returns zeros:
        the choice of backends, the Triton launcher and functions of torch are replaced until the
        end.
        """
        patches = (
            (backends, "select", partial(self._select, backends.select)),
            (launching, "start", self._count_launch),
            (similarity_plan, "first_rows", self._few_first_rows),
            (fakes.FakeTensor, "tolist", self._tolist),
            (torch.cuda, "synchronize", lambda *_: self.count_wait("synchronize")),
        )
        with ExitStack() as stack:
            stack.enter_context(mock.patch.dict(registry._selected, clear=True))
            for patch in patches:
                stack.enter_context(mock.patch.object(*patch))
            stack.enter_context(self)
            yield

    def set_repeats(self, times: int) -> None:
        """Makes each kernel that is counted from now on stand for `times` runs."""
        self.times = times

    def _few_first_rows(self, size: int, step: int) -> Iterator[int]:
        """In place of `first_rows`: the second chunk stands for those between it and the last."""
        rows = range(0, size, step)
        if len(rows) < 4:
            yield from rows
            return
        before = self.times
        for row, count in ((rows[0], 1), (rows[1], len(rows) - 2), (rows[-1], 1)):
            self.times = before * count
            yield row
            self.times = before

    def count_wait(self, name: str) -> None:
        """Counts a wait of the host for a value, as a Kernel by "host" named after what waits."""
        self.usage.kernels.append(Kernel("host", name, times=self.times))

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is _DEVICE:
            return func(*args, **kwargs)
        if func not in self._leaf_ops:
            with self:
                out = self._decomposed(func, args, kwargs)
            if out is not NotImplemented:
                return out
            self._leaf_ops[func] = started_by(func)
        try:
            # no bias: the results are dq, dk, dv and an empty one
            if func is _EFFICIENT_BACKWARD and args[4] is None:
                out = *map(torch.empty_like, args[1:4]), args[1].new_empty(0)
            else:
                out = func(*args, **kwargs)
        except (*_NO_FAKE, *_VALUES) as error:
            if self.value is not None and isinstance(error, fakes.DataDependentOutputException):
                if self.waits:
                    self.count_wait(func.name())
                return self.value
            reason = f"{type(error).__name__} {str(error).strip()}".splitlines()[0]
            raise UncountedOp(
                f"{func.name()}: its memory cannot be predicted, since it does not run on fake "
                f"tensors: {reason}"
            ) from error
        self.hold(out, self.kind, instead_of=())
        if func is torch.ops.aten._flash_attention_backward.default:
            self.count_workspace(_flash_scratch(args[1], args[6]))
        if func.namespace == "simplclip":
            self._record_extension(func, args, out)
        else:
            self._record(func, args, kwargs, out)
        return out

    def _decomposed(self, func: OpOverload, args: tuple, options: dict[str, Any]) -> Any:
        """Returns the results of an op that is composed of others; else NotImplemented."""
        name = func.name()
        if func.namespace == "simplclip" and _has_kernel(name, "CompositeExplicitAutograd"):
            return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **options)
        if func.namespace == "prim" or _has_kernel(name, self.device.type.upper()):
            return NotImplemented
        return func.decompose(*args, **options)

    def _record_extension(self, func: OpOverload, args: tuple, out: object) -> None:
        """Counts the workspace and the kernel of a function of C++ or CUDA that has run."""
        op, _, backend = func._opname.rpartition("_")
        self.count_workspace(workspace_bytes(func._opname, args))
        names = [argument.name for argument in func._schema.arguments]
        fields, results = tree_map_only(Tensor, self.stand, (dict(zip(names, args)), out))
        stands = [v for v in tree_leaves((fields, results)) if isinstance(v, Stand)]
        call = ExtensionCall(op, SimpleNamespace(**fields))
        work = *extension_work(call), sum(t.bytes for t in stands)
        self.usage.kernels.append(Kernel(backend, op, stands[0].dtype, *work, call, self.times))

    def _record(self, func: OpOverload, args: tuple, options: dict[str, Any], out: object) -> None:
        """Adds the kernels of an op of torch that has run to `usage`."""
        name, starts_kernel = self._leaf_ops[func]
        if not starts_kernel:
            return
        tensors = [t for t in tree_leaves((args, options, out)) if isinstance(t, Tensor)]
        if "copy" in name and len({t.device.type for t in tensors}) > 1:
            self.count_wait(func.name())
            return
        if not any(t.device.type == self.device.type and t.numel() for t in tensors):
            return
        args, options, out = tree_map_only(Tensor, self.stand, (args, options, out))
        results = [t for t in tree_leaves(out) if isinstance(t, Stand)]
        if not results:  # it changes lists of tensors
            results = [t for t in tree_leaves(args[0]) if isinstance(t, Stand)]
        for kernel in kernels_of(name, args, options, results):
            kernel.times *= self.times
            self.usage.kernels.append(kernel)

    @property
    def _tolist(self) -> Callable[[Tensor], list[float]]:
        """A method in place of FakeTensor.tolist: counts a wait and returns a zero per element."""

        def tolist(tensor: Tensor) -> list[float]:
            self.count_wait("tolist")
            return [0.0] * tensor.numel()

        return tolist

    def stand(self, tensor: Tensor) -> Stand:
        """Returns a Stand for a tensor; tensors with one storage get the same storage number.

        The number is kept while the storage lives.
        """
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._numbers:
            self._numbers[key] = (
                next(self._next),
                weakref.ref(storage, lambda _: self._numbers.pop(key, None)),
            )
        return Stand.of(tensor, self._numbers[key][0])

    def _count_launch(
        self, kernel: Any, programs: int, args: tuple, options: dict[str, Any]
    ) -> None:
        """Counts a Triton kernel instead of starting it; in place of `kernels.runtime.start`."""
        name = kernel.__name__.strip("_").removesuffix("_kernel")
        args, options = tree_map_only(Tensor, self.stand, (args, options))
        first = next(t for t in tree_leaves((args, options)) if isinstance(t, Stand))
        launch = Launch(kernel, (programs,), args, options)
        self.usage.kernels.append(
            Kernel("triton", name, first.dtype, *launch_work(name, launch), launch, self.times)
        )

    def _select(
        self,
        select: Callable,
        op: str,
        device: torch.device,
        dtype: torch.dtype,
        spec: str,
        facts: backends.Facts,
        part: bool,
    ) -> type[backends.Backend]:
        """Selects a backend by `select`; what one in Python allocates counts as workspace."""
        in_python = [
            backend
            for name, backend in backends.TABLE[op].items()
            if name != "reference" and not hasattr(torch.ops.simplclip, f"{op}_{name}")
        ]
        backend = select(op, device, dtype, spec, facts, part=part)
        if backend not in in_python:
            return backend
        # The first stands for all that can run the call: another library's attention needs the
        # same memory as torch's, but does not run on fake tensors.
        backend = next(b for b in in_python if b.why_not(device, dtype, facts) is None)
        run = staticmethod(partial(self._run_in_workspace, getattr(backend, op)))
        return type(backend.__name__, (backend,), {op: run})

    def _run_in_workspace(self, function: Callable, call: Any) -> Any:
        """Runs a backend's function; all that it allocates, but its results, is workspace."""
        outer = self.kind
        with self.during(WORKSPACE):
            out = function(call)
        self.hold(out, outer, instead_of=(WORKSPACE,))
        return out

    def _free(self, key: int, _: object) -> None:
        """Subtracts a storage that was freed from the live bytes; `key` is its key in `_held`."""
        kind, size, _ = self._held.pop(key)
        self._change(kind, -size)

    def _change(self, kind: str, size: int) -> None:
        """Adds `size` bytes, which may be negative, to the live bytes of `kind`."""
        if not size:
            return
        self.live[kind] += size
        usage, total = self.usage, self.live.total()
        usage.events.append((kind, size))
        if total > usage.peak:
            usage.peak = total
            usage.at_peak = {kind: self.live[kind] for kind in KINDS if self.live[kind]}


def workspace_bytes(native: str, args: tuple) -> int:
    """Returns the bytes that a C++ or CUDA function allocates besides its results, at their peak.

    native: the function's op without its library, as "shaped_attention_fwd_cpu". args: those of
    the op, of whose tensors only shapes, strides and dtypes are read; nothing runs. On a GPU each
    allocation is rounded up to 512 bytes, as in torch's allocator. The memory of cuBLAS is not
    included, and neither is the memory of oneDNN in bfloat16 products.

    Raises UncountedOp if the function states nothing, or its extension is not loaded.
    """
    function = getattr(torch.ops.simplclip, f"{native}_workspace")
    try:
        with _disable_current_modes():
            return function(*tree_map_only(Tensor, _on_meta, args))
    except NotImplementedError:
        raise UncountedOp(f"no workspace is stated for {native}") from None


def _flash_scratch(q: Tensor, bounds: Tensor | None) -> int:
    """Returns the bytes of FlashAttention's backward: sums of dq and a number a head, in float32.

    bounds: where packed sequences begin and end, [B + 1].
    """
    heads, width = q.shape[-2:]
    width += -width % (32 if width <= 128 else 64)
    # rows of sequences are padded to tiles
    if bounds is not None:
        rows = q.shape[0] + 128 * (len(bounds) - 1)
    else:
        rows = q.shape[0] * (q.shape[1] + -q.shape[1] % 128)
    return 4 * rows * heads * (width + 1)


def _on_meta(tensor: Tensor) -> Tensor:
    """Returns a tensor on the meta device with the tensor's shape, strides, offset and dtype."""
    size = 0
    if tensor.numel():
        size = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride()))
    memory = torch.empty(tensor.storage_offset() + size, dtype=tensor.dtype, device="meta")
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
