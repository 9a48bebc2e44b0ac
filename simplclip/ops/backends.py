"""Backends: the ways to compute an op, and which one runs a call.

A backend is a class in a file of its own, with a static method for each op that it has. An op's
op.py lists its backends in the order in which they are tried: the first that supports a call runs
the call. docs/architecture.md says what each is.

`with simplclip.backend("cpu"):` and the environment variable SIMPLCLIP_BACKEND=cpu force a backend
for all ops; `simplclip.backend(shaped_attention="sdpa")` and
SIMPLCLIP_BACKEND=shaped_attention=sdpa,parallel_mlp=reference force backends of single ops. A
forced backend that does not support a call raises an error.
"""

from __future__ import annotations

import contextlib
import functools
import graphlib
import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import fields
from operator import attrgetter
from typing import Any, NamedTuple

import torch

from simplclip.calls.fields import schema_of
from simplclip.ops.extension import load

library = torch.library.Library("simplclip", "DEF")

extension, extension_error = load("_C")
# A constant, so that torch.compile can trace code that depends on it.
native_bf16: bool = extension is not None and extension.has_native_bf16()
if torch.version.cuda is not None:
    cuda_extension, cuda_extension_error = load("_C_cuda")
else:
    cuda_extension = None
    cuda_extension_error = f"torch {torch.__version__} is a build without CUDA"


def computes_in(dtype: torch.dtype, device: str) -> torch.dtype:
    """Returns the dtype of products of features: theirs, or float32 where a CPU lacks theirs."""
    if device != "cpu" or dtype not in (torch.float16, torch.bfloat16):
        return dtype
    if dtype == torch.bfloat16 and native_bf16:
        return dtype
    return torch.float32


class Facts(NamedTuple):
    """What the predicates read of a call of attention, besides device and dtype.

    Calls of other ops have the defaults.
    """

    length: int = 1  # tokens of a sequence
    width: int = 16  # of a head
    lengths: bool = False  # whether the call has `lengths`


NO_FACTS = Facts()


class Backend:
    """A way to compute some ops: a static method for each, which is named after the op.

    The method takes the op's call, or the call that the op's `run` makes of it, see
    registry.define, and returns what the reference's method returns.
    """

    name: str

    @staticmethod
    def why_not(device: torch.device, dtype: torch.dtype, facts: Facts) -> str | None:
        """Returns why the backend cannot run a call with these `Facts`; None if it can.

        device, dtype: of the call's tensors.
        """
        raise NotImplementedError


def why_not_kernels(serves: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns why kernels for the device type `serves` cannot run a call, or None if they can."""
    if device.type != serves:
        return f"serves {serves} tensors, not {device.type}"
    if dtype == torch.float64:
        return "computes in float32; float64 is for the reference"
    return None


@functools.cache
def installed(package: str) -> bool:
    """Whether a package can be found; it is not imported."""
    return importlib.util.find_spec(package) is not None


@functools.cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """Returns a GPU's compute capability (major, minor), or None on a machine without."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


def has_code(architectures: str, card: tuple[int, int]) -> bool:
    """Whether a build for architectures, e.g. "8.6;9.0+PTX", runs on a compute capability.

    Machine code runs on its major version from its minor version on, PTX on every later card.
    """
    for name in architectures.split(";"):
        number, _, ptx = name.partition("+")
        major, minor = map(int, number.split("."))
        if (major, minor) <= card and (ptx or major == card[0]):
            return True
    return False


def extension_on_cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns why the CUDA extension cannot run a call of any op, or None if it can."""
    if cuda_extension is None:
        return cuda_extension_error
    if reason := why_not_kernels("cuda", device, dtype):
        return reason
    card = capability(device)
    built = cuda_extension.architectures()
    if card is None or has_code(built, card):
        return None
    number = ".".join(map(str, card))
    return (
        f"was built for {built}, the device has compute capability "
        f"{number}: rebuild with TORCH_CUDA_ARCH_LIST={number}"
    )


class Reference(Backend):
    """Plain torch, for every device and dtype."""

    name = "reference"

    @staticmethod
    def why_not(device: torch.device, dtype: torch.dtype, facts: Facts) -> None:
        """Returns None: the reference runs every call."""


class Triton(Backend):
    """Triton kernels, whose methods import their launchers from simplclip.kernels when called:
    importing Triton takes time, and some platforms lack it.
    """

    name = "triton"

    @staticmethod
    def why_not(device: torch.device, dtype: torch.dtype, facts: Facts = NO_FACTS) -> str | None:
        """Returns why Triton cannot run a call of any op; None if it can."""
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


class Cpu(Backend):
    """C++ for the CPU, whose methods are `native`."""

    name = "cpu"

    @staticmethod
    def why_not(device: torch.device, dtype: torch.dtype, facts: Facts) -> str | None:
        """Returns why the extension for the CPU cannot run a call of any op; None if it can."""
        if extension is None:
            return extension_error
        return why_not_kernels("cpu", device, dtype)


def native(name: str, call_type: type, returns: str, empty: Callable) -> Any:
    """Registers the op `simplclip::name`, which C++ implements; returns a backend's method for it.

    name: the method's, and the backend's after an underscore. call_type: the dataclass of its call,
    whose fields are the arguments. returns: the result types in the schema. empty(call): makes its
    results for fake tensors, uninitialised.
    """
    # C++ runs with numbers, never traced
    arguments = schema_of(call_type).replace("SymInt", "int")
    library.define(f"{name}({arguments}) -> {returns}")
    torch.library.register_fake(
        f"simplclip::{name}", lambda *fields: empty(call_type(*fields)), lib=library
    )
    overload = getattr(torch.ops.simplclip, name).default
    values = attrgetter(*(field.name for field in fields(call_type)))
    return staticmethod(lambda call: overload(*values(call)))


# op -> name -> backend, in the order in which they are tried; simplclip.ops.registry.define adds an
# op's row.
TABLE: dict[str, dict[str, type[Backend]]] = {}


def names() -> tuple[str, ...]:
    """Returns the names of all backends, in an order that is the one of each op."""
    before: dict[str, list[str]] = {}
    for row in TABLE.values():
        for first, second in itertools.pairwise(row):
            before.setdefault(second, []).append(first)
    return tuple(graphlib.TopologicalSorter(before).static_order())


def public_name(op: str) -> str:
    """Returns the name of the public op that an op of the table belongs to, e.g. without "_fwd"."""
    if op.startswith("similarity"):
        return "similarity_loss"
    return op.removesuffix("_fwd").removesuffix("_bwd")


@functools.cache
def _parse(spec: str) -> dict[str, str]:
    """Parses a text as in SIMPLCLIP_BACKEND: public op, or "" for all ops -> forced backend."""
    by_op = {}
    for part in filter(None, spec.split(",")):
        op, _, name = part.rpartition("=")
        ops = {public_name(op) for op in TABLE}
        if op and op not in ops:
            raise ValueError(f"backend: expected an op among {', '.join(sorted(ops))}, got {op!r}")
        if name not in names():
            raise ValueError(f"backend: expected one of {', '.join(names())}, got {name!r}")
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
) -> type[Backend]:
    """Returns the backend that is forced, or the first that can run a call.

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
        return TABLE[op][name]
    for backend in TABLE[op].values():
        if backend.why_not(device, dtype, facts) is None:
            return backend
    raise RuntimeError(f"no backend serves {op} on {device.type} with {dtype}")
