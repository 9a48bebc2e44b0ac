"""Counts the work of an op's call on a card without a card: runs the real op on fake CUDA tensors, kernel by kernel.

Launchers run as they are, and their launches are recorded; torch's own kernels are its ops as they reach the dispatcher.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.bound.cards import Card
from simplclip.kernels import launch as launching
from simplclip.memory import fake
from simplclip.ops import backends, registry

CUDA = torch.device("cuda", 0)
Touched = tuple[int, int]  # the number of a storage, and its bytes that are accessed
# Products of [L, L, K] for each head in torch's attention ops, by the beginning of the op's name.
ATTENTION = {
    "_scaled_dot_product_flash_attention_backward": 5, "_scaled_dot_product_efficient_attention_backward": 5,
    "_flash_attention_backward": 5, "_efficient_attention_backward": 5, "_scaled_dot_product_flash_attention": 2,
    "_scaled_dot_product_efficient_attention": 2, "_flash_attention_forward": 2, "_efficient_attention_forward": 2,
}  # fmt: skip
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "mv", "addmv", "dot", "vdot")
SEVERAL = {"unbind_copy": 2, "select_backward": 2, "slice_backward": 2}  # kernels of an op: a copy each, or zeros and a copy
_NO_KERNEL = (
    "empty", "new_empty", "resize_", "set_", "record_stream", "_unsafe_view", "_reshape_alias", "lift_fresh", "prim",
)  # fmt: skip


@dataclass
class Step:
    """One kernel, or a copy from or to the host."""

    kind: str  # "torch", "triton", "cuda" or "host"
    name: str
    dtype: torch.dtype | None = None
    multiply_adds: int = 0
    operands: list[Touched] = field(default_factory=list)  # of a product
    read: list[Touched] = field(default_factory=list)
    written: list[Touched] = field(default_factory=list)
    launch: Any = None  # Launch or ExtensionCall, for kernels of this library


@dataclass
class Launch:
    """A kernel that a launcher of Triton started, and its arguments."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    options: dict[str, Any]


@dataclass
class ExtensionCall:
    """A call of a function of the CUDA extension: its op, and its fields with a Stand for each tensor."""

    op: str
    call: Any


class Stand:
    """A stand-in for a tensor with all that Triton and the predictions read of it. It does not keep the tensor alive."""

    def __init__(self, tensor: Tensor, storage: int) -> None:
        self.dtype, self.shape, self.itemsize, self.storage = tensor.dtype, tensor.shape, tensor.itemsize, storage
        self.allocated = tensor.untyped_storage().nbytes()
        self._at, self._stride = tensor.storage_offset() * tensor.itemsize, tensor.stride()

    def stride(self) -> tuple[int, ...]:
        return self._stride

    def dim(self) -> int:
        return len(self.shape)

    def touched(self) -> Touched:
        """Returns the storage and its bytes that are accessed; an expanded dimension is read once."""
        return self.storage, math.prod(n for n, step in zip(self.shape, self._stride) if step or not n) * self.itemsize

    def data_ptr(self) -> int:
        return self._at

    def ptr_range(self) -> int:
        return 0


class Trace(TorchDispatchMode):
    """Context that collects the steps of the ops that run in it."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._numbers: dict[int, tuple[int, weakref.ref]] = {}
        self._next = itertools.count()

    def stand(self, tensor: Tensor) -> Stand:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._numbers:
            self._numbers[key] = next(self._next), weakref.ref(storage, lambda _: self._numbers.pop(key, None))
        return Stand(tensor, self._numbers[key][0])

    def host(self, name: str) -> None:
        self.steps.append(Step("host", name))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        ours = registry.DISPATCH.get(func.name())
        if ours is not None:
            with self:
                return ours(*args, through=self._native)
        if func.name().startswith("prim::"):
            return func(*args, **kwargs)
        with self:
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        try:
            out = func(*args, **kwargs)
        except DataDependentOutputException:
            self.host(func.name())
            return 0.0
        self._record(func, [*tree_leaves(args), *tree_leaves(kwargs)], out)
        return out

    def _record(self, func, given: list, out: Any) -> None:
        inputs = [t for t in given if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        name = func.name().removeprefix("aten::").split(".")[0]
        if "copy" in name and {t.device.type for t in (*inputs, *outputs)} == {"cpu", "cuda"}:
            return self.host(func.name())
        if not any(t.is_cuda for t in outputs) or name.startswith(_NO_KERNEL):
            return None
        changed = [a.alias_info for a in func._schema.arguments if a.alias_info is not None]
        if changed and not any(a.is_write for a in changed):  # a view
            return None
        if not any(t.numel() for t in outputs):
            return None
        stands = [self.stand(t) for t in inputs if t.is_cuda]
        results = [self.stand(t) for t in outputs]
        step = Step(
            "torch", name, outputs[0].dtype, read=[t.touched() for t in stands], written=[t.touched() for t in results]
        )
        if name in PRODUCTS:
            _of_product(step, name, stands, results[0])
        elif products := next((n for start, n in ATTENTION.items() if name.startswith(start)), 0):
            q, k = stands["backward" in name :][:2]
            tokens = 2 if name.startswith("_scaled") else 1  # [B, H, L, K] or [B, L, H, K]
            if q.dim() == 4:  # packed sequences [T, H, K] have lengths in values, so that no work is counted
                step.multiply_adds = products * math.prod(q.shape) * k.shape[tokens]
            step.dtype, step.operands, step.read = q.dtype, step.read, []
        elif name in ("fill_", "zero_", "copy_"):
            step.read = [t.touched() for t in stands[1:]]
        self.steps += [step] * SEVERAL.get(name, 1)
        return None

    def _native(self, op: str, backend: str, function: Callable) -> Callable:
        """Returns a backend's function, but for the CUDA extension a function that records the call in its place."""

        def record(call):
            out = registry.NATIVE_FAKES[op](call)
            given = {name: self.stand(v) if isinstance(v, Tensor) else v for name, v in vars(call).items()}
            stands = [v for v in given.values() if isinstance(v, Stand)]
            step = Step("cuda", op, stands[0].dtype, launch=ExtensionCall(op, SimpleNamespace(**given)))
            step.operands = [t.touched() for t in stands]
            step.written = [self.stand(t).touched() for t in tree_leaves(out) if isinstance(t, Tensor)]
            self.steps.append(step)
            return out

        return record if backend == "cuda" else function

    def launched(self, kernel: Any, programs: int, args: tuple, options: dict[str, Any]) -> None:
        name = kernel.__name__.strip("_").removesuffix("_kernel")
        args, options = tree_map_only(Tensor, self.stand, (args, options))
        first = next(t for t in tree_leaves((args, options)) if isinstance(t, Stand))
        self.steps.append(Step("triton", name, first.dtype, launch=Launch(kernel, (programs,), args, options)))


def _of_product(step: Step, name: str, inputs: Sequence[Stand], out: Stand) -> None:
    first = int(name.startswith(("add", "badd")))  # these ops add their first input
    left, right = inputs[first : first + 2]  # mm.out has `out` last
    step.multiply_adds = math.prod(out.shape) * left.shape[-1]
    step.dtype, step.operands = left.dtype, [left.touched(), right.touched()]
    step.read = [t.touched() for t in inputs[:first]]


def _forget() -> None:
    """Clears the caches of launchers, backends and selected functions, which hold properties of a device."""
    registry._selected.clear()
    for module in (launching, backends):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


@contextlib.contextmanager
def on_card(card: Card) -> Iterator[Trace]:
    """Context in which ops of fake CUDA tensors run as on this card, and are traced."""
    trace, mode = Trace(), FakeTensorMode(allow_fallback_kernels=False)
    capability = divmod(card.architecture, 10)
    properties = SimpleNamespace(
        major=capability[0], minor=capability[1], multi_processor_count=card.multiprocessors, total_memory=card.memory << 30,
        L2_cache_size=card.l2 << 20, name="fake",
    )  # fmt: skip

    def to_list(tensor):
        trace.host("tolist")
        return [0.0] * tensor.numel()

    _forget()
    with contextlib.ExitStack() as stack:
        stack.enter_context(fake.fake_step(mode, CUDA))
        stack.enter_context(fake.Engine(lambda gradient: None).installed())
        for patch in (
            (torch.cuda, "get_device_properties", lambda *_: properties),
            (torch.cuda, "device_of", lambda *_: contextlib.nullcontext()),
            (torch.cuda, "synchronize", lambda *_: trace.host("synchronize")),
            (backends, "capability", lambda device: capability),
            (backends, "_has_binary", lambda index: True),
            (launching, "start", trace.launched),
            (FakeTensor, "tolist", to_list),
            (registry, "counted", True),
        ):
            stack.enter_context(mock.patch.object(*patch))
        stack.enter_context(trace)
        yield trace
    _forget()
