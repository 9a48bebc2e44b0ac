"""Records what calls start on a card that need not be there: Triton's launches, kernels of the CUDA
extension, ops of torch, and waits of the host for a value. Tensors are fake: no kernel runs.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map_only

from simplclip.kernels import runtime
from simplclip.ops import backends
from simplclip.plan.cards import CARDS, Card
from simplclip.plan.meter import NO_KERNEL, Meter


@dataclass
class Stand:
    """A stand-in for a tensor with all that Triton reads of it; it does not keep it alive."""

    dtype: torch.dtype
    shape: Sequence[int]
    strides: Sequence[int]
    storage: int  # the number of its storage
    allocated: int = 0  # bytes of the storage
    offset: int = 0  # bytes before the first element

    @classmethod
    def of(cls, t: Tensor, storage: int) -> Stand:
        size, offset = t.untyped_storage().nbytes(), int(t.storage_offset()) * t.itemsize
        return cls(t.dtype, t.shape, t.stride(), storage, size, offset)

    def stride(self) -> Sequence[int]:
        return self.strides

    def dim(self) -> int:
        return len(self.shape)

    def data_ptr(self) -> int:
        return self.offset

    def ptr_range(self) -> int:
        return 0  # Triton asks each tensor for it


class Launch(NamedTuple):
    """A launch of a Triton kernel, with a Stand for each tensor."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    options: dict[str, Any]


class Started(NamedTuple):
    by: str  # "torch", "triton", "cuda", or "host" for a wait
    name: str
    launch: Launch | None = None


class Recorder(Meter):
    """A mode that records in `started`, and counts live bytes, whose highest sum is `peak`."""

    def __init__(self) -> None:
        super().__init__("cuda")
        self.started: list[Started] = []
        self._next = itertools.count()
        self._numbers: dict[int, int] = {}  # of storages that live

    def stand(self, tensor: Tensor) -> Stand:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._numbers:
            self._numbers[key] = next(self._next)
            weakref.finalize(storage, self._numbers.pop, key)
        return Stand.of(tensor, self._numbers[key])

    def launch(self, kernel: Any, *args: Any, grid: tuple, warmup: bool, **options: Any) -> None:
        """In place of Triton's JITFunction.run."""
        args, options = tree_map_only(Tensor, self.stand, (args, options))
        name = kernel.__name__.strip("_").removesuffix("_kernel")
        self.started.append(Started("triton", name, Launch(kernel, grid, args, options)))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        kwargs = kwargs or {}
        name = func.name().partition("::")[2].partition(".")[0]
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        if func.namespace == "simplclip":
            if has_kernel(func.name(), "CompositeExplicitAutograd"):  # of a backend in Python
                with self:
                    return func._op_dk(
                        torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs
                    )
            self.started.append(Started(name.rpartition("_")[2], name.rpartition("_")[0]))
        elif func.namespace != "prim" and not has_kernel(func.name(), "CUDA"):
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if func is torch.ops.aten._local_scalar_dense.default:
            self.started.append(Started("host", name))
            return 0
        out = func(*args, **kwargs)
        self.hold(out)
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        devices = {t.device.type for t in tensors}
        starts = func.namespace == "aten" and not func.is_view and not name.startswith(NO_KERNEL)
        if "copy" in name and len(devices) > 1:
            self.started.append(Started("host", name))
        elif starts and "cuda" in devices and any(t.numel() for t in tensors):
            self.started.append(Started("torch", name))
        return out


@contextlib.contextmanager
def on_card(card: Card) -> Iterator[Recorder]:
    """Context in which tensors are fake, CUDA devices seem to be `card`, and calls are recorded."""
    from triton.runtime import JITFunction

    recorder = Recorder()

    def launch(kernel: Any, *args: Any, **options: Any) -> None:
        recorder.launch(kernel, *args, **options)

    major, minor = divmod(card.architecture, 10)
    properties = SimpleNamespace(
        major=major,
        minor=minor,
        multi_processor_count=card.multiprocessors,
        total_memory=card.memory << 30,
        L2_cache_size=card.l2 << 20,
    )
    patches: list[tuple[Any, str, Any]] = [
        (torch.cuda, "get_device_properties", lambda *_: properties),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "device_of", lambda *_: contextlib.nullcontext()),
        (torch.cuda, "synchronize", lambda *_: recorder.started.append(Started("host", "wait"))),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        (backends, "capability", lambda device: (major, minor)),
        (torch.autograd, "backward", backward),
        (torch._C, "_current_graph_task_id", lambda: 1),
        (JITFunction, "run", launch),
    ]
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12):
        plain = torch.addmm

        def addmm(*args: Tensor, out_dtype: Any = None, **options: Any) -> Tensor:
            """Torch's, whose fake fails with `out_dtype`."""
            return plain(*args, **options) if out_dtype is None else options["out"]

        patches.append((torch, "addmm", addmm))
    if backends.cuda_extension is not None:
        patches.append((backends.cuda_extension, "architectures", lambda: "8.0+PTX"))
    forget_devices()
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        # before it overwrites a saved tensor, an op asks if the graph is kept
        keeps = (torch._C._autograd, "_get_current_graph_task_keep_graph")
        stack.enter_context(mock.patch.object(*keeps, return_value=False, create=True))
        stack.enter_context(FakeTensorMode(allow_fallback_kernels=False))
        # a saved tensor is packed into a list, which `backward` clears after its node has run
        stack.enter_context(saved_tensors_hooks(lambda tensor: [tensor], _unpack))
        stack.enter_context(recorder)
        yield recorder
    forget_devices()


def forget_devices() -> None:
    """Clears the caches of launchers and backends, which hold properties of a device."""
    for module in (runtime, backends):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


_unpacked: list[list[Tensor]] = []


def _unpack(saved: list[Tensor]) -> Tensor:
    _unpacked.append(saved)
    return saved[0]


@torch.no_grad()
def backward(
    tensors: Tensor | Sequence[Tensor], grad_tensors: Any = None, *_: Any, **options: Any
) -> None:
    """In place of torch.autograd.backward, whose engine asks a device for its streams."""
    roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    given = grad_tensors if isinstance(grad_tensors, Sequence) else [grad_tensors] * len(roots)
    buffers: dict[Node, dict[int, Tensor]] = {}
    for root, gradient in zip(roots, given):
        edge = torch.autograd.graph.get_gradient_edge(root)
        gradient = torch.ones_like(root) if gradient is None else gradient
        buffers.setdefault(edge.node, {})[edge.output_nr] = gradient
    while buffers:  # the node that was made last has no others before it
        node: Any = max(buffers, key=lambda each: each._sequence_nr())
        buffer = buffers.pop(node)
        arrived = [buffer.get(output) for output in range(len(node._input_metadata))]
        del buffer
        if hasattr(node, "variable"):
            leaf, (gradient,) = node.variable, arrived
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
            continue
        is_python = isinstance(node, torch.autograd.function.BackwardCFunction)
        outputs = node.apply(*arrived) if is_python else node(*arrived)
        while _unpacked:
            _unpacked.pop().clear()
        outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
        if is_python:  # it has no edges for inputs that are no tensors
            outputs = [o for o, need in zip(outputs, node.needs_input_grad) if need]
            edges = [edge for edge in node.next_functions if edge[0] is not None]
        else:
            edges = node.next_functions
        for (following, output), gradient in zip(edges, outputs):
            if following is None or gradient is None:
                continue
            meta = following._input_metadata[output]
            if list(gradient.shape) != list(meta.shape):  # over dimensions that were broadcast
                gradient = gradient.sum_to_size(list(meta.shape))
            gradient = gradient.to(meta.dtype)
            sums = buffers.setdefault(following, {})
            sums[output] = sums[output] + gradient if output in sums else gradient


def trace(
    run: Callable[[dict[str, Any]], object], tensors: dict[str, Any], card: str = "rtx-3090"
) -> list[Started]:
    """Runs `run` with fake CUDA tensors like `tensors` on a card; returns what it started."""

    def like(t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")

    with on_card(CARDS[card]) as recorder:
        run(tree_map_only(Tensor, like, tensors))
    return recorder.started


def names(started: list[Started], *kinds: str) -> Counter[str]:
    """Counts what was started of some kinds, by name."""
    return Counter(each.name for each in started if each.by in kinds)
