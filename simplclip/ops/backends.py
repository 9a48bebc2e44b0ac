"""The table op -> backend -> function. Each function has a predicate, which returns why the function cannot run a call.

A backend is one of

    cuda       hand-written CUDA C++
    triton     Triton kernels
    cpu        C++ for the CPU
    sdpa       shaped attention around torch's scaled_dot_product_attention
    xformers   shaped attention around memory_efficient_attention of the package xformers
    reference  plain torch for any device and dtype: the definition of the op. If it is forced, autograd differentiates
               the definition (any order, forward mode, torch.func) and keeps all matrices.

The first backend in this order that supports a call runs the call, unless `simplclip tune` has measured that another backend
is faster for such calls on this machine. `with simplclip.backend("cpu"):` and the environment variable SIMPLCLIP_BACKEND
force one backend for the whole process; an op that this backend does not support raises an error. A backend that fails
`simplclip selftest` for an op and dtype is taken out on this machine, forward and backward together; the reference never is.
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

import torch

from simplclip.common import machine
from simplclip.common.tuned import choices, name_of
from simplclip.ops.calls import flat
from simplclip.ops.extension import load

NAMES = ("cuda", "triton", "cpu", "sdpa", "xformers", "reference")

_forced: str = os.environ.get("SIMPLCLIP_BACKEND", "")

extension, extension_error = load("_C")
# A constant, so that torch.compile can trace code that depends on it.
native_bf16: bool = extension is not None and extension.has_native_bf16()
if torch.version.cuda is None:
    cuda_extension, cuda_extension_error = None, f"torch {torch.__version__} is a build without CUDA"
else:
    cuda_extension, cuda_extension_error = load("_C_cuda")


@dataclass(frozen=True)
class Implementation:
    """A backend's function for an op; `why_not(device_type, dtype, **facts of the call)` is None if the function can run."""

    function: Callable
    why_not: Callable[..., str | None]


def why_not_kernels(serves: str, device: str, dtype: torch.dtype) -> str | None:
    """Returns why kernels for tensors of the device type `serves` cannot run a call, or None if they can."""
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
    """Whether a package is installed. Cached: every call asks, and a search of sys.path takes longer than a small op."""
    return importlib.util.find_spec(package) is not None


def triton_on_cuda(device: str, dtype: torch.dtype, **call) -> str | None:
    """Returns why Triton cannot run a call. Triton serves CUDA tensors, or CPU tensors with TRITON_INTERPRET=1, for tests."""
    if not installed("triton"):
        return "the package triton is not installed"
    serves = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    reason = why_not_kernels(serves, device, dtype)
    return f"{reason} (TRITON_INTERPRET=1)" if device != serves == "cpu" else reason


@functools.cache
def capability() -> tuple[int, int] | None:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def _no_binary(built: str, device: tuple[int, int]) -> str | None:
    """Returns why kernels built for `built`, written as in TORCH_CUDA_ARCH_LIST, do not run on a device of this capability.

    Machine code runs on devices of its major version, from its minor version on; PTX, which the driver compiles, runs on all
    later devices. Code for 9.0a runs on 9.0 alone; code for a family, e.g. 10.0f, has no PTX for devices outside of it.
    """
    for major, minor, letter, ptx in re.findall(r"(\d+)\.(\d)([af]?)(\+PTX)?", built):
        least = int(major), int(minor)
        anywhere = ptx and not letter
        if device == least or (letter != "a" and device > least and (anywhere or device[0] == least[0])):
            return None
    number = ".".join(map(str, device))
    return f"was built for {built}, the device has compute capability {number}: rebuild with TORCH_CUDA_ARCH_LIST={number}"


def extension_on_cuda(device: str, dtype: torch.dtype) -> str | None:
    """Returns why the CUDA extension cannot run a call, for reasons that hold for every op; None if there are none."""
    if cuda_extension is None:
        return cuda_extension_error
    reason = why_not_kernels("cuda", device, dtype)
    if reason is None and capability():
        reason = _no_binary(cuda_extension.architectures(), capability())
    return reason


def _native(name: str) -> Callable:
    """Returns a function that runs the op of C++. The op is looked up at the call, since the extension may be missing."""
    return lambda call: getattr(torch.ops.simplclip, name)(*flat(call))


def kernel(module: str, name: str) -> Callable:
    """Returns a launcher of kernels/, imported at its first call: importing Triton takes time, and some platforms lack it."""
    return lambda *call: getattr(importlib.import_module(f"simplclip.kernels.{module}"), name)(*call)


def row(
    reference: Callable,
    *,
    module: str = "",
    cuda: Callable | None = None,
    cpu: bool | None = None,
) -> dict[str, Implementation]:
    """Returns the backends of an op with their predicates. Their functions are named after the definition `reference`.

    module: the module of simplclip.kernels with the op's launcher, if Triton has the op. cuda: the predicate of CUDA C++, if
    CUDA C++ has the op. cpu: whether C++ for the CPU has the op, by default if Triton has it.
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
    """Forces the backend `name` for every op of the process within the block; a backward uses the backend of its forward."""
    global _forced
    _known(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def forced() -> str:
    """Returns the name of the forced backend, or an empty string."""
    return _forced


TAKEN_OUT = "failed simplclip selftest on this machine ({}); simplclip selftest --reset brings it back"
_supposed: dict[str, str] | None = None


def family(op: str) -> str:
    """Returns the name of the op without the suffix _fwd or _bwd."""
    return op.removesuffix("_fwd").removesuffix("_bwd")


def key(op: str, name: str, dtype: torch.dtype) -> str:
    """Returns the key under which backend `name` is taken out for forward and backward of an op in a dtype."""
    return f"{family(op)} {name} {str(dtype).removeprefix('torch.')}"


def taken_out(device: str) -> dict[str, str]:
    """Returns the keys (see `key`) of the backends that are taken out on a device type, each with the reason."""
    return machine.known("failed", device) if _supposed is None else _supposed


@contextlib.contextmanager
def with_taken_out(failed: dict[str, str]) -> Iterator[None]:
    """Takes out the keys in `failed` instead of those that failed `simplclip selftest`. On entry no backend is forced."""
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
    """Returns why backend `name` cannot run `op` on this device type and dtype with these facts of a call; None if it can."""
    if name not in TABLE[op]:
        return f"{op} has no {name} implementation"
    return TABLE[op][name].why_not(device, dtype, **call) or _why_taken_out(op, name, device, dtype)


def backend_of_part(op: str, name: str) -> str:
    """Returns the backend to ask for `op`, a part of an op for which `name` was asked: "" if `op` has no backend `name`."""
    return "" if name in NAMES and name not in TABLE[op] else name


LENGTHS = (64, 128, 256, 512, 1024)  # attention is tuned for classes of sequence lengths; the most tokens of each class


def choice_of(op: str, dtype: torch.dtype, length: int = 0) -> str:
    """Returns the name of the choice among backends of `op`, forward and backward, for sequences of about `length` tokens."""
    what = f"backend of {family(op)}"
    if length:  # comparisons alone, since the length may be symbolic
        most = next((most for most in LENGTHS if length <= most), None)
        what += f" of more than {LENGTHS[-1]} tokens" if most is None else f" of up to {most} tokens"
    return name_of(what, dtype)


def _chosen(found: dict[str, str], op: str, dtype: torch.dtype, *, length: int = 0, lengths: bool = False, **call) -> str:
    """Returns the backend measured as fastest for such calls, or an empty string. Calls with `lengths` are not measured."""
    return "" if lengths else found.get(choice_of(op, dtype, length), "")


def select(op: str, device: str, dtype: torch.dtype, name: str = "", **call) -> tuple[str, Callable]:
    """Returns a backend for `op` and its function: `name`, else the choice of `simplclip tune`, else the first that can run.

    A choice that cannot run the call is ignored. Raises RuntimeError if `name`, or without a name every backend, cannot run.
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
