"""What a step on fake CUDA tensors would start on a card: kernels by name, copies from and to the host, waits for values."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from simplclip.kernels import launch
from simplclip.memory import fake
from simplclip.memory.count import Counter

CUDA = torch.device("cuda", 0)
WITHOUT_KERNEL = ("empty", "new_empty", "_unsafe_view", "detach", "lift_fresh", "_reshape_alias", "device")


class Trace(Counter):
    """started: the names of torch's functions that start kernels, of ours in C++, and of Triton's kernels.

    between: functions that take or make tensors of the host beside those of the card. A value that is read is an UncountedOp.
    numbers: among the arguments of each kernel of Triton.
    """

    def __init__(self) -> None:
        super().__init__(CUDA)
        self.started: list[str] = []
        self.between: list[str] = []
        self.numbers: list[list[int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace != "simplclip":
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            devices = {t.device.type for t in tensors if t.dim() or t.device.type != "cpu"}
            if len(devices) > 1:
                self.between.append(func.name())
            name = func._opname
            if "cuda" in devices and not func.is_view and not name.startswith(WITHOUT_KERNEL):
                self.started.append(name)
        return out

    def _native(self, op, backend, function):
        run = super()._native(op, backend, function)

        def told(call):
            if backend in ("cuda", "cpu"):
                self.started.append(f"{op} in C++")
            return run(call)

        return told


def trace(run: Callable[[dict[str, Tensor]], None], tensors: dict[str, Tensor]) -> Trace:
    """Runs `run` with fake CUDA tensors like the given ones."""
    found, mode = Trace(), FakeTensorMode(allow_fallback_kernels=False)
    fakes = tree_map_only(Tensor, fake.faker(mode, CUDA), tensors)
    found.hold(fakes, "batch")

    def kernel(self, grid):
        found.started.append(self.kernel.fn.__name__)
        return lambda *args, **options: found.numbers.append([n for n in args if isinstance(n, int)])

    with (
        mock.patch.object(launch.started, "__getitem__", kernel),
        fake.fake_step(mode, CUDA),
        fake.Engine(lambda gradient: None).installed(),
        found.counting(),
    ):
        run(fakes)
    return found
