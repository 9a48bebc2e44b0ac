"""The table op -> backend -> function.

Each function has a predicate, which returns why the function cannot run a call.

A backend is one of

    cuda       hand-written CUDA C++
    triton     Triton kernels
    cpu        C++ for the CPU
    sdpa       shaped attention around torch's scaled_dot_product_attention
    xformers   shaped attention around memory_efficient_attention of the package xformers
    reference  plain torch for any device and dtype

The first backend in this order that supports a call runs the call. `with simplclip.backend("cpu"):`
and the environment variable SIMPLCLIP_BACKEND=cpu force a backend for all ops;
`simplclip.backend(shaped_attention="sdpa")` and
SIMPLCLIP_BACKEND=shaped_attention=sdpa,parallel_mlp=reference force backends of single ops. A
forced backend that does not support a call raises an error.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch

from simplclip.ops.extension import load

NAMES = ("cuda", "triton", "cpu", "sdpa", "xformers", "reference")

extension, extension_error = load("_C")
# A constant, so that torch.compile can trace code that depends on it.
native_bf16: bool = extension is not None and extension.has_native_bf16()
if torch.version.cuda is not None:
    cuda_extension, cuda_extension_error = load("_C_cuda")
else:
    cuda_extension = None
    cuda_extension_error = f"torch {torch.__version__} is a build without CUDA"


class Facts(NamedTuple):
    """What the predicates read of a call of attention, besides device and dtype.

    Calls of other ops have the defaults.
    """

    length: int = 1  # tokens of a sequence
    width: int = 16  # of a head
    lengths: bool = False  # whether the call has `lengths`


NO_FACTS = Facts()


@dataclass(frozen=True)
class Implementation:
    """A backend's function for an op, and its predicate.

    `why_not(device, dtype, facts)` is None if the function can run a call with these `Facts`.
    """

    function: Callable
    why_not: Callable[..., str | None]


def why_not_kernels(serves: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns why kernels for the device type `serves` cannot run a call, or None if they can.

    serves: "cpu" or "cuda". device, dtype: of the call's tensors.
    """
    if device.type != serves:
        return f"serves {serves} tensors, not {device.type}"
    if dtype == torch.float64:
        return "computes in float32; float64 is for the reference"
    return None


def _anywhere(device: torch.device, dtype: torch.dtype, facts: Facts) -> str | None:
    """Returns None: the reference runs every call. The predicate of "reference"."""
    return None


def _extension_on_cpu(device: torch.device, dtype: torch.dtype, facts: Facts) -> str | None:
    """Returns why the C++ extension for the CPU cannot run a call, or None; ignores `facts`."""
    if extension is None:
        return extension_error
    return why_not_kernels("cpu", device, dtype)


@functools.cache
def installed(package: str) -> bool:
    """Whether a package can be found; it is not imported. Cached."""
    return importlib.util.find_spec(package) is not None


@functools.cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """Returns a GPU's compute capability (major, minor), or None on a machine without. Cached."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


def triton_on_cuda(device: torch.device, dtype: torch.dtype, facts: Facts = NO_FACTS) -> str | None:
    """Returns why Triton cannot run a call of any op, or None if it can; ignores `facts`."""
    if not installed("triton"):
        return "the package triton is not installed"
    if reason := why_not_kernels("cuda", device, dtype):
        return reason
    card = capability(device)
    if card is not None and (card < (8, 0) or card[0] == 10):
        return (
            "is compiled for compute capabilities 8.x, 9.x and 12.x; the device has "
            f"{card[0]}.{card[1]}"
        )
    return None


@functools.cache
def _has_binary(index: int) -> bool:
    """Whether the CUDA extension, which must be loaded, has kernels for GPU `index`. Cached."""
    return bool(cuda_extension.binary_version(index))


def extension_on_cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns why the CUDA extension cannot run a call of any op, or None if it can."""
    if cuda_extension is None:
        return cuda_extension_error
    if reason := why_not_kernels("cuda", device, dtype):
        return reason
    card = capability(device)
    if card is None:
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    if _has_binary(index):
        return None
    number = ".".join(map(str, card))
    return (
        f"was built for {cuda_extension.architectures()}, the device has compute capability "
        f"{number}: rebuild with TORCH_CUDA_ARCH_LIST={number}"
    )


def _native(name: str, fields: tuple[str, ...]) -> Callable:
    """Returns a function that runs C++'s op simplclip::<name> on the `fields` of a call.

    The op is looked up at the first call: the extension may be missing.
    """
    values = attrgetter(*fields)
    overloads: list[Callable] = []

    def run(call):
        if not overloads:
            overloads.append(getattr(torch.ops.simplclip, name).default)
        return overloads[0](*values(call))

    return run


def kernel(module: str, name: str) -> Callable:
    """Returns a function that calls launcher `name` of simplclip.kernels.<module>.

    The module is imported at the first call: importing Triton takes time, and some platforms lack
    it.
    """

    def run(*arguments: Any) -> Any:
        launcher = getattr(importlib.import_module(f"simplclip.kernels.{module}"), name)
        return launcher(*arguments)

    return run


def row(
    reference: Callable,
    call: Any,
    *,
    module: str = "",
    cuda: Callable | None = None,
    cpu: bool = True,
) -> dict[str, Implementation]:
    """Returns the backends of an op by name; their functions are named after `reference`.

    reference: the function in plain torch. call: the dataclass of the functions' argument. module:
    the module of simplclip.kernels with the op's launcher, or "" if Triton lacks the op. cuda: the
    predicate of CUDA C++, or None if CUDA C++ lacks the op. cpu: whether C++ for the CPU has the
    op.
    """
    name = reference.__name__
    fields = call.__match_args__
    backends = {}
    if cuda is not None:
        backends["cuda"] = Implementation(_native(f"{name}_cuda", fields), cuda)
    if module:
        backends["triton"] = Implementation(kernel(module, name), triton_on_cuda)
    if cpu:
        backends["cpu"] = Implementation(_native(f"{name}_cpu", fields), _extension_on_cpu)
    return backends | {"reference": Implementation(reference, _anywhere)}


# op -> backend -> function; simplclip.ops.registry.define fills it.
TABLE: dict[str, dict[str, Implementation]] = {}


def public_name(op: str) -> str:
    """Returns the name of the public op that an op of the table belongs to, e.g. without "_fwd"."""
    if op.startswith("similarity"):
        return "similarity_loss"
    return op.removesuffix("_fwd").removesuffix("_bwd")


@functools.cache
def _parse(spec: str) -> dict[str, str]:
    """Parses a text as in SIMPLCLIP_BACKEND: public op, or "" for all ops -> forced backend.

    Raises ValueError for a name that is no op or no backend. Cached.
    """
    by_op = {}
    for part in filter(None, spec.split(",")):
        op, _, name = part.rpartition("=")
        ops = {public_name(op) for op in TABLE}
        if op and op not in ops:
            raise ValueError(f"backend: expected an op among {', '.join(sorted(ops))}, got {op!r}")
        if name not in NAMES:
            raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
        by_op[op] = name
    return by_op


_forced: str = os.environ.get("SIMPLCLIP_BACKEND", "").replace(" ", "")


def forced() -> str:
    """Returns which backends are forced now, in the form of SIMPLCLIP_BACKEND; "" if none is."""
    return _forced


def forced_for(op: str, spec: str) -> str:
    """Returns the backend that a spec (see `forced`) forces for an op; "" if it forces none."""
    if not spec:
        return ""
    by_op = _parse(spec)
    return by_op.get(public_name(op)) or by_op.get("", "")


@contextlib.contextmanager
def backend(
    name: str | None = None,
    /,
    *,
    similarity_loss: str | None = None,
    shaped_attention: str | None = None,
    parallel_mlp: str | None = None,
) -> Iterator[None]:
    """Forces backends within the block, for the whole process: `name` for all ops, or some ops'.

        with simplclip.backend("reference"): ...
        with simplclip.backend(shaped_attention="sdpa", parallel_mlp="reference"): ...

    Ops that the block does not name keep the backend that was forced outside. A backward uses the
    backend of its forward. Raises ValueError for an unknown backend.
    """
    global _forced
    outer = {"": name} if name else _parse(_forced)
    by_op = {
        "similarity_loss": similarity_loss,
        "shaped_attention": shaped_attention,
        "parallel_mlp": parallel_mlp,
    }
    merged = outer | {op: value for op, value in by_op.items() if value is not None}
    spec = ",".join(f"{op}={value}" if op else value for op, value in merged.items())
    _parse(spec)
    before = _forced
    _forced = spec
    try:
        yield
    finally:
        _forced = before


def why_not(
    op: str, name: str, device: torch.device, dtype: torch.dtype, facts: Facts = NO_FACTS
) -> str | None:
    """Returns why backend `name` cannot run a call of `op`, or None if it can.

    op: a key of TABLE. device, dtype: of the call's tensors. facts: see `Facts`.
    """
    if name not in TABLE[op]:
        return f"{op} has no {name} implementation"
    return TABLE[op][name].why_not(device, dtype, facts)


def select(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    spec: str = "",
    facts: Facts = NO_FACTS,
    *,
    part: bool = False,
) -> tuple[str, Callable]:
    """Returns the name and the function of the forced backend, or of the first that can run.

    op: a key of TABLE. spec: the forced backends, see `forced`. facts: see `Facts`. part:
    whether `op` is a part of another op: a backend that is forced for all ops is ignored if the
    part does not have it. Raises RuntimeError if the forced backend, or without one every backend,
    cannot run.
    """
    name = forced_for(op, spec)
    if name and part and name not in TABLE[op] and public_name(op) not in _parse(spec):
        name = ""
    if name:
        if reason := why_not(op, name, device, dtype, facts):
            raise RuntimeError(f"backend {name!r} was forced but cannot serve {op}: {reason}")
        return name, TABLE[op][name].function
    for candidate in NAMES:
        if why_not(op, candidate, device, dtype, facts) is None:
            return candidate, TABLE[op][candidate].function
    raise RuntimeError(f"no backend serves {op} on {device.type} with {dtype}")
