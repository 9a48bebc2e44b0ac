"""Which function runs an op: a table, op -> backend -> function, with a predicate for each that returns why it cannot.

A backend is one of

    cuda       hand-written CUDA C++
    triton     Triton kernels
    cpu        C++ for the CPU
    sdpa       shaped attention around torch's scaled_dot_product_attention
    xformers   the same around memory_efficient_attention of the package xformers
    reference  plain torch for any device and dtype, the definition of the op. If it is forced, autograd differentiates
               through it (any order, forward mode, torch.func), which keeps all matrices.

The first backend in this order that supports a call runs it, unless `simplclip tune` has measured that another one is faster
for such calls on this machine. `with simplclip.backend("cpu"):` and the environment variable SIMPLCLIP_BACKEND force one
backend for the whole process; an op that it does not support then raises an error. What fails `simplclip selftest` on this
machine supports nothing there, forward and backward together; the reference is never taken out.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from simplclip.common import machine
from simplclip.common.tuned import choices, name_of
from simplclip.ops.calls import flat

NAMES = ("cuda", "triton", "cpu", "sdpa", "xformers", "reference")

_forced: str = os.environ.get("SIMPLCLIP_BACKEND", "")


def _load_extension(name: str) -> tuple[Any, str | None]:
    """The extension module simplclip.<name> and None, or None and the reason why it is missing."""
    try:
        return importlib.import_module(f"simplclip.{name}"), None
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        return None, f"simplclip.{name} was not built" if missing else f"simplclip.{name} does not load: {error}"


extension, extension_error = _load_extension("_C")
# A constant, so that torch.compile can trace code that depends on it.
native_bf16: bool = extension is not None and extension.has_native_bf16()
if torch.version.cuda is None:
    cuda_extension, cuda_extension_error = None, f"torch {torch.__version__} is a build without CUDA"
else:
    cuda_extension, cuda_extension_error = _load_extension("_C_cuda")


@dataclass(frozen=True)
class Implementation:
    """One backend's function for an op; `why_not(device_type, dtype, **facts of the call)` is None if it can run."""

    function: Callable
    why_not: Callable[..., str | None]


def why_not_kernels(serves: str, device: str, dtype: torch.dtype) -> str | None:
    """Why kernels for the tensors of one device type cannot run a call."""
    if device != serves:
        return f"serves {serves} tensors, not {device}"
    return "computes in float32; float64 is for the reference" if dtype == torch.float64 else None


def _anywhere(device: str, dtype: torch.dtype, **call) -> str | None:
    return None


def _extension_on_cpu(device: str, dtype: torch.dtype, **call) -> str | None:
    if extension is None:
        return extension_error
    return why_not_kernels("cpu", device, dtype)


@functools.cache
def installed(package: str) -> bool:
    """Cached, since it is asked at every call, and a search of sys.path costs more than a small op."""
    return importlib.util.find_spec(package) is not None


def triton_on_cuda(device: str, dtype: torch.dtype, **call) -> str | None:
    """Triton serves CUDA tensors; with TRITON_INTERPRET=1 its interpreter serves CPU tensors instead, for tests."""
    if not installed("triton"):
        return "the package triton is not installed"
    serves = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    reason = why_not_kernels(serves, device, dtype)
    return f"{reason} (TRITON_INTERPRET=1)" if device != serves == "cpu" else reason


@functools.cache
def capability() -> tuple[int, int] | None:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def _no_binary(built: str, device: tuple[int, int]) -> str | None:
    """Why kernels that were built for `built`, as in TORCH_CUDA_ARCH_LIST, do not run on a device of this capability.

    Machine code runs on devices of its major version, from its minor version on; PTX, which the driver compiles, on all later
    ones. That of an architecture with a letter, e.g. 9.0a, runs there alone.
    """
    for major, minor, letter, ptx in re.findall(r"(\d+)\.(\d)([af]?)(\+PTX)?", built):
        least = int(major), int(minor)
        if device == least or (not letter and device > least and (ptx or device[0] == least[0])):
            return None
    number = ".".join(map(str, device))
    return f"was built for {built}, the device has compute capability {number}: rebuild with TORCH_CUDA_ARCH_LIST={number}"


def extension_on_cuda(device: str, dtype: torch.dtype) -> str | None:
    """Why the CUDA extension cannot run a call, whatever the op."""
    if cuda_extension is None:
        return cuda_extension_error
    reason = why_not_kernels("cuda", device, dtype)
    if reason is None and capability():
        reason = _no_binary(cuda_extension.architectures(), capability())
    return reason


def _native(name: str) -> Callable:
    """The op that C++ implements, looked up when it is called, since the extension may be missing."""
    return lambda call: getattr(torch.ops.simplclip, name)(*flat(call))


def kernel(module: str, name: str) -> Callable:
    """A launcher of kernels/, imported when it is called, since importing Triton takes time and some platforms lack it."""
    return lambda *call: getattr(importlib.import_module(f"simplclip.kernels.{module}"), name)(*call)


def row(
    reference: Callable,
    *,
    module: str = "",
    cuda: Callable | None = None,
    cpu: bool | None = None,
) -> dict[str, Implementation]:
    """The backends of an op, whose functions have the name of its definition `reference`, with their predicates.

    module: the module of simplclip.kernels with its launcher, if Triton has the op. cuda: the predicate of CUDA C++, if it
    has the op. cpu: whether C++ for the CPU has it, by default where Triton does.
    """
    name, found = reference.__name__, {}
    if cuda is not None:
        found["cuda"] = Implementation(_native(f"{name}_cuda"), cuda)
    if module:
        found["triton"] = Implementation(kernel(module, name), triton_on_cuda)
    if module if cpu is None else cpu:
        found["cpu"] = Implementation(_native(f"{name}_cpu"), _extension_on_cpu)
    return found | {"reference": Implementation(reference, _anywhere)}


# op -> backend -> function; simplclip.ops.registry.define fills it.
TABLE: dict[str, dict[str, Implementation]] = {}


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces the backend `name` for every op of the process within the block; a backward runs on its forward's backend."""
    global _forced
    _known(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def forced() -> str:
    """The name of the forced backend, or an empty string."""
    return _forced


TAKEN_OUT = "failed simplclip selftest on this machine ({}); simplclip selftest --reset brings it back"
_supposed: dict[str, str] | None = None


def family(op: str) -> str:
    """The op without its direction."""
    return op.removesuffix("_fwd").removesuffix("_bwd")


def key(op: str, name: str, dtype: torch.dtype) -> str:
    """By which backend `name` is taken out for forward and backward of an op in a dtype."""
    return f"{family(op)} {name} {str(dtype).removeprefix('torch.')}"


def taken_out(device: str) -> dict[str, str]:
    """What is taken out on a device type, by key, and why."""
    return machine.known("failed", device) if _supposed is None else _supposed


@contextlib.contextmanager
def supposing(failed: dict[str, str]) -> Iterator[None]:
    """Takes out these, by key, in place of what failed `simplclip selftest` here; at first no backend is forced."""
    global _supposed, _forced
    before, _supposed, _forced = (_supposed, _forced), failed, ""
    try:
        yield
    finally:
        _supposed, _forced = before


def _why_taken_out(op: str, name: str, device: str, dtype: torch.dtype) -> str | None:
    failed = taken_out(device)
    out = failed and name != "reference" and (of := key(op, name, dtype)) in failed
    return TAKEN_OUT.format(failed[of]) if out else None


def _known(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")


def why_not(op: str, name: str, device: str, dtype: torch.dtype, **call) -> str | None:
    """Why backend `name` cannot run `op` on this device type and dtype with these facts of a call; None if it can."""
    if name not in TABLE[op]:
        return f"{op} has no {name} implementation"
    return TABLE[op][name].why_not(device, dtype, **call) or _why_taken_out(op, name, device, dtype)


def of_part(op: str, name: str) -> str:
    """What is asked of `op`, a part of another op for which `name` was asked: nothing if it has no backend of that name."""
    return "" if name in NAMES and name not in TABLE[op] else name


LENGTHS = (64, 128, 256, 512, 1024)  # the most tokens of an attention in each class of sizes that is tuned


def choice_of(op: str, dtype: torch.dtype, length: int = 0) -> str:
    """The name of the choice among the backends of `op`, forward and backward, for sequences of about `length` tokens."""
    what = f"backend of {family(op)}"
    if length:  # compared rather than computed with, since it may be symbolic
        most = next((most for most in LENGTHS if length <= most), None)
        what += f" of more than {LENGTHS[-1]} tokens" if most is None else f" of up to {most} tokens"
    return name_of(what, dtype)


def _chosen(found: dict[str, str], op: str, dtype: torch.dtype, *, length: int = 0, lengths: bool = False, **call) -> str:
    """The backend that was found to be fastest for such calls, or an empty string. Calls with `lengths` are not measured."""
    return "" if lengths else found.get(choice_of(op, dtype, length), "")


def select(op: str, device: str, dtype: torch.dtype, name: str = "", **call) -> tuple[str, Callable]:
    """The backend that runs `op`: `name` if given, else the one of `simplclip tune`, else the first that can.

    Raises RuntimeError if none can.
    """
    if name:
        _known(name)
        reason = why_not(op, name, device, dtype, **call)
        if reason:
            raise RuntimeError(f"backend {name!r} was forced but cannot serve {op}: {reason}")
        return name, TABLE[op][name].function
    found = choices(device)
    chosen = _chosen(found, op, dtype, **call) if found else ""
    for candidate in (chosen, *NAMES) if chosen else NAMES:
        if why_not(op, candidate, device, dtype, **call) is None:
            return candidate, TABLE[op][candidate].function
    raise RuntimeError(f"no backend serves {op} on {device} with {dtype}")
