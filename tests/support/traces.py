"""What a step of an op does on a GPU: its launches, torch's kernels, bytes and copies from the host, on fake CUDA tensors."""

import functools
import operator
from collections import Counter
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from simplclip.kernels import launch as launching
from simplclip.kernels.similarity import launch as similarity_launch
from simplclip.kernels.similarity import op, sigmoid, terms
from simplclip.memory import fake
from simplclip.ops import registry, similarity_loss

CUDA = torch.device("cuda", 0)
_NO_KERNEL = (
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "detach",
    "alias",
    "view",
    "_unsafe_view",
    "lift_fresh",
    "device",
)


@dataclass(eq=False)
class Trace(TorchDispatchMode):
    """Counts of what runs within it."""

    launches: Counter = field(default_factory=Counter)  # of our kernels, by name
    kernels: Counter = field(default_factory=Counter)  # of torch's, by the op's name
    host_copies: list[str] = field(default_factory=list)  # ops that copy from or to the host, or wait for the device
    bytes: int = 0  # that torch's kernels read and write, but for the blocks of G, which products read on their left

    def __post_init__(self):
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        ours = registry.DISPATCH.get(func.name())
        if ours is not None:
            with self:
                return ours(*args, through=self._native)
        out = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::")
        operands, results = ([t for t in tree_leaves(x) if isinstance(t, Tensor)] for x in ((args, kwargs), out))
        memory = {t.untyped_storage()._cdata for t in operands}
        looks = not func._schema.is_mutable and all(t.untyped_storage()._cdata in memory for t in results)
        if looks or name.split(".")[0] in _NO_KERNEL or not any(t.numel() for t in results):
            return out
        if any(t.device.type == "cpu" for t in operands + results) or name.startswith(("_local_scalar", "nonzero")):
            self.host_copies.append(name)
        self.kernels[name] += 1
        if name.startswith(("mm", "addmm")):
            left = args[name.startswith("addmm")]
            operands = [t for t in operands if t is not left]
        self.bytes += sum(t.nbytes for tensors in (operands, results) for t in {id(t): t for t in tensors}.values())
        return out

    def _native(self, op, backend, function):
        def launch(*args):
            with launching.pretended():
                return function(*args)

        return launch if backend == "triton" else function

    def start(self, kernel):
        """In place of simplclip.kernels.launch.started."""
        self.launches[kernel.fn.__name__] += 1
        return _Grid()


class _Grid:
    def __getitem__(self, grid):
        return lambda *args, **options: None


def trace(tensors: dict[str, Tensor], **options) -> Trace:
    """A step of similarity_loss, forward and backward. tensors: of shapes alone, on the device "meta"."""
    found, mode = Trace(), FakeTensorMode(allow_fallback_kernels=False)
    given = tree_map_only(Tensor, fake.faker(mode, CUDA), tensors | options)
    for name, t in given.items():
        for leaf in tree_leaves(t):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                leaf.requires_grad_(not name.startswith("teacher"))
    with (
        fake.fake_step(mode, CUDA),
        fake.Engine(lambda gradient: None).installed(),
        mock.patch.object(registry, "counted", True),
        mock.patch.multiple(op, started=found.start, starts=_starts),
        mock.patch.object(sigmoid, "started", found.start),
        mock.patch.object(terms, "started", found.start),
        mock.patch.object(similarity_launch, "starts", _starts),
        found,
    ):
        out = similarity_loss(**given)
        loss = out["loss"] if "weights" in options else functools.reduce(operator.add, out.values())
        loss.backward()
    return found


def _starts(size: int, step: int) -> range:
    """All of them; a plan leaves out what changes no memory."""
    return range(0, size, step)
