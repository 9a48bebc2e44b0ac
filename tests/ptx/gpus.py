"""Two GPUs whose memory is the host's, an A100 and an RTX 3090. Programs use them as CUDA devices,
and the machine executes the kernels.

In a process with `environment()`, cudart.cpp takes the place of the CUDA runtime:

    with gpus.running(code_of):
        similarity_loss(image, text, scale)  # of cuda:0 or cuda:1

Devices, streams, guards and allocations are those of torch's code for CUDA. Torch's kernels are
those for the CPU, on the same memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ptx.capture import SHARED, Card, Driver, Launcher, driven, widening
from ptx.machine import Code, Launch
from ptx.memory import GUARD, GlobalMemory

ARCHITECTURES = (80, 86)  # as in cudart.cpp
SOURCE = Path(__file__).with_name("cudart.cpp")
# of nvcc, for a library
FLAGS = ["-shared", "-std=c++20", "-O1", "-cudart=none", "-Xcompiler=-fPIC,-Wall,-Wextra"]
FLAGS += ["-Xlinker=-soname=libcuda.so.1"]  # torch opens the driver too
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.POINTER(ctypes.c_void_p),
)


def why_not() -> str | None:
    """Returns why programs cannot run on these GPUs here, or None."""
    if (torch.version.cuda or "").partition(".")[0] != "13":
        return f"tests/ptx/cudart.cpp is for CUDA 13, torch has {torch.version.cuda}"
    return None


def environment(library: Path) -> dict[str, str]:
    """Returns the variables of a process whose CUDA devices these GPUs are. library: of cudart.cpp.

    Each tensor has an allocation of its own, so that an access beyond it is found.
    """
    return {"LD_PRELOAD": str(library), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


class Started(NamedTuple):
    """Where a kernel was started."""

    kernel: str
    device: int
    stream: int


class DeviceMemory(GlobalMemory):
    """The allocations of a GPU. Kernels read and write the bytes of torch's tensors themselves."""

    def __init__(self, library: ctypes.CDLL, device: int, granule: int):
        count = library.simplclip_allocations(device, 0, None)
        table = np.zeros((count, 2), np.int64)
        library.simplclip_allocations(device, count, table.ctypes.data_as(ctypes.c_void_p))
        self.base = int(table[0, 0]) - GUARD
        size = int(table[-1].sum()) + GUARD - self.base
        size -= size % 16
        self.data = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.base))
        self.track(granule)
        self.allowed = {1: np.zeros(size, bool)}
        for begin, length in table:
            self.allowed[1][begin - self.base :][:length] = True

    def address(self, tensor: Tensor) -> int:
        return tensor.data_ptr()

    def write_back(self) -> None:
        pass


@dataclass
class Gpu(Card):
    library: ctypes.CDLL | None = None
    device: int = 0

    def memory(self, tensors: list[Any], code: Code) -> DeviceMemory:
        return DeviceMemory(self.library, self.device, code.granules["global"])


class Gpus:
    """The two GPUs of this process.

    code_of: returns the extension's kernel of a mangled name for an architecture.
    """

    def __init__(self, code_of: Callable[[str, int], Code]):
        # other programs, which this one starts, run without
        self.library = ctypes.CDLL(os.environ.pop("LD_PRELOAD"))
        self.library.simplclip_allocations.restype = ctypes.c_int64
        self.code_of = code_of
        self.cards = [
            Gpu(sm=sm, library=self.library, device=device)
            for device, sm in enumerate(ARCHITECTURES)
        ]
        # so that both have memory in use
        self.others = [torch.empty(1024, device=f"cuda:{each.device}") for each in self.cards]
        self.started: list[Started] = []
        self.failures: list[str] = []  # of the extension's kernels
        self.callback = _CALLBACK(self.launch)
        self.library.simplclip_set_launch(self.callback)

    def forget(self) -> None:
        """Forgets what was started and found."""
        self.started.clear()
        self.failures.clear()
        for each in self.cards:
            each.hazards.clear()

    def launch(
        self,
        name: bytes,
        device: int,
        stream: int | None,
        blocks: int,
        threads: int,
        shared: int,
        arguments: Any,
    ) -> int:
        """Runs a kernel for the runtime; returns whether it failed."""
        try:
            self.started.append(Started(name.decode(), device, stream or 0))
            card = self.cards[device]
            code = self.code_of(name.decode(), card.sm)
            parameters = np.zeros(code.kernel.parameter_bytes, np.uint8)
            for (offset, size), address in zip(code.kernel.parameters, arguments):
                value = ctypes.string_at(address, size)
                parameters[offset : offset + size] = np.frombuffer(value, np.uint8)
            memory = card.memory([], code)
            card.execute(Launch(code, blocks, threads, shared, parameters, memory))
        except Exception:  # which cannot pass through C++
            self.failures.append(traceback.format_exc())
        return len(self.failures)


class _Launcher(Launcher):
    def __call__(self, x: int, y: int, z: int, stream: int, code: Code, *others: Any) -> None:
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        driver.gpus.started.append(Started(self.source.name, device, stream))
        super().__call__(x, y, z, stream, code, *others)


class _Driver(Driver):
    """Triton's driver for both GPUs."""

    def __init__(self, gpus: Gpus):
        self.gpus = gpus
        self.launcher_cls = _Launcher
        self.utils = self

    @property
    def card(self) -> Gpu:
        return self.gpus.cards[self.get_current_device()]

    def get_current_device(self) -> int:
        return torch.cuda.current_device()

    def get_current_stream(self, device: int) -> int:
        return torch._C._cuda_getCurrentRawStream(device)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED[ARCHITECTURES[device]]}


def on_host(t: Tensor) -> Tensor:
    """Returns a tensor of the CPU in the memory of one of a GPU."""
    if not t.is_cuda:
        return t
    storage = torch.UntypedStorage(0)
    if size := t.untyped_storage().nbytes():
        memory = (ctypes.c_uint8 * size).from_address(t.untyped_storage().data_ptr())
        storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=t.dtype).set_(storage, t.storage_offset(), t.shape, t.stride())


def _served(op: Any) -> Callable:
    """Returns a function that runs an op of torch on the CPU, for tensors of a GPU."""

    def run(*args: Any, **options: Any) -> Any:
        hosts: list[Tensor] = []
        given: list[Tensor] = []

        def taken(t: Tensor) -> Tensor:
            given.append(t)
            hosts.append(on_host(t))
            return hosts[-1]

        def returned(result: Tensor) -> Tensor:
            for host, t in zip(hosts, given):
                if result is host and host.shape != t.shape:
                    on_host(t.resize_(host.shape)).copy_(host)
                if result is host:
                    return t
            out = torch.empty_strided(
                result.shape, result.stride(), dtype=result.dtype, device=device
            )
            on_host(out).copy_(result)
            return out

        args, options = tree_map_only(Tensor, taken, (args, options))
        device = options.pop("device", None) or next(t.device for t in given if t.is_cuda)
        return tree_map_only(Tensor, returned, op(*args, **options))

    return run


def _served_ops() -> Iterator[tuple[str, Any]]:
    """Yields the names and the ops that have kernels for CUDA; views and new memory need none."""
    yield "copy_", torch.ops.aten.copy_.default
    for full_name in torch._C._dispatch_get_all_op_names():
        namespace, _, name = full_name.partition("::")
        if namespace != "aten":
            continue
        if not torch._C._dispatch_has_kernel_for_dispatch_key(full_name, "CUDA"):
            continue
        base, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.aten, base), overload or "default", None)
        keeps_memory = base.startswith(("empty", "set_", "resize_", "record_stream"))
        if op is not None and not op.is_view and not keeps_memory:
            yield name, op


@contextlib.contextmanager
def running(code_of: Callable[[str, int], Code]) -> Iterator[Gpus]:
    """Context in which kernels run on the two GPUs. code_of: see Gpus."""
    library = torch.library.Library("aten", "IMPL", "CUDA")
    for name, op in _served_ops():
        library.impl(name, _served(op), allow_override=True)
    with contextlib.ExitStack() as stack:
        for name in ("mm", "addmm"):
            product = widening(getattr(torch, name))
            stack.enter_context(mock.patch.object(torch, name, product))
        gpus = Gpus(code_of)
        stack.enter_context(driven(_Driver(gpus)))
        yield gpus
