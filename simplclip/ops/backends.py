"""Backends: the ways to compute an op, and which one runs a call.

A backend is a row of `TABLE`: a module that has a function for each of the op's registered ops,
named after it, and a function that says which calls it cannot run. The first row that can run a
call runs it. docs/architecture.md says what each is.

`with simplclip.backend("cpu"):` and the environment variable SIMPLCLIP_BACKEND=cpu force a backend
for all ops; `simplclip.backend(shaped_attention="sdpa")` and
SIMPLCLIP_BACKEND=shaped_attention=sdpa,parallel_mlp=reference force backends of single ops. A
forced backend that does not support a call raises an error.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from simplclip.ops.extension import load

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
    """What the functions `why_not` read of a call of attention, besides device and dtype.

    Calls of other ops have the defaults.
    """

    length: int = 1  # tokens of a sequence
    width: int = 16  # of a head
    lengths: bool = False  # whether the call has `lengths`


NO_FACTS = Facts()


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


def _why_not_cuda(device: torch.device, dtype: torch.dtype, facts: Facts) -> str | None:
    if reason := extension_on_cuda(device, dtype):
        return reason
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32":
        return (
            "serves float32 only through TF32, which torch does not allow "
            "(torch.backends.cuda.matmul.allow_tf32)"
        )
    reason = cuda_extension.shaped_attention_why_not(
        facts.length, facts.width, dtype == torch.float32
    )
    return reason and f"{reason}; got {facts.length} tokens, width {facts.width}"


def why_not_triton(device: torch.device, dtype: torch.dtype, facts: Facts = NO_FACTS) -> str | None:
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


def _why_not_cpu(device: torch.device, dtype: torch.dtype, facts: Facts) -> str | None:
    return extension_error if extension is None else why_not_kernels("cpu", device, dtype)


def _why_not_sdpa(device: torch.device, dtype: torch.dtype, facts: Facts) -> str | None:
    if device.type not in ("cuda", "cpu"):
        return f"serves cuda and cpu tensors, not {device.type}"
    return why_not_kernels(device.type, device, dtype)


def _why_not_xformers(device: torch.device, dtype: torch.dtype, facts: Facts) -> str | None:
    if not installed("xformers"):
        return "the package xformers is not installed"
    if facts.lengths:
        return "takes lengths only as a list on the host"
    return why_not_kernels("cuda", device, dtype)


def _serves_all(device: torch.device, dtype: torch.dtype, facts: Facts) -> None:
    return None


class Backend(NamedTuple):
    """A way to compute an op.

    module: of the functions, imported at the first call, since importing Triton takes time and some
    platforms lack it. A function takes the op's call, or the call that the op's `run` makes of it
    (see registry.define), and returns what the reference's function returns. why_not(device, dtype,
    facts) returns why the backend cannot run a call, or None.
    """

    module: str
    why_not: Callable[[torch.device, torch.dtype, Facts], str | None]


NAMES = ("cuda", "triton", "cpu", "sdpa", "xformers", "reference")
# public op -> name -> backend, in the order in which they are tried
TABLE: dict[str, dict[str, Backend]] = {
    "similarity_loss": {
        "triton": Backend("simplclip.kernels.similarity.launch", why_not_triton),
        "cpu": Backend("simplclip.ops.native", _why_not_cpu),
        "reference": Backend("simplclip.ops.similarity.reference", _serves_all),
    },
    "shaped_attention": {
        "cuda": Backend("simplclip.ops.attention.cuda", _why_not_cuda),
        "cpu": Backend("simplclip.ops.native", _why_not_cpu),
        "sdpa": Backend("simplclip.ops.attention.sdpa", _why_not_sdpa),
        "xformers": Backend("simplclip.ops.attention.xformers", _why_not_xformers),
        "reference": Backend("simplclip.ops.attention.reference", _serves_all),
    },
    "parallel_mlp": {
        "triton": Backend("simplclip.kernels.mlp.launch", why_not_triton),
        "cpu": Backend("simplclip.ops.native", _why_not_cpu),
        "reference": Backend("simplclip.ops.mlp.reference", _serves_all),
    },
}
# public ops that are composed of others
PARTS = {"simplified_block": ("shaped_attention", "parallel_mlp")}


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
    op: str, device: torch.device, dtype: torch.dtype, name: str = "", facts: Facts = NO_FACTS
) -> str:
    """Returns the forced backend `name`, or if it is "" the first that can run a call.

    op: a key of TABLE. facts: see `Facts`. Raises RuntimeError if the forced backend, or without
    one every backend, cannot run; ValueError if SIMPLCLIP_BACKEND has an unknown name.
    """
    _check(_forced)
    if name:
        if reason := why_not(op, name, device, dtype, facts):
            raise RuntimeError(f"backend {name!r} was forced but cannot serve {op}: {reason}")
        return name
    for name, backend in TABLE[op].items():
        if backend.why_not(device, dtype, facts) is None:
            return name
    raise RuntimeError(f"no backend serves {op} on {device.type} with {dtype}")


def _parsed(text: str) -> dict[str, str]:
    """Parses a text as in SIMPLCLIP_BACKEND: public op, or "" for all ops -> forced backend."""
    by_op = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        op, _, name = part.rpartition("=")
        by_op[op] = name
    return by_op


def _check(by_op: dict[str, str]) -> None:
    """Raises ValueError for an unknown op or backend."""
    for op, name in by_op.items():
        if op and op not in TABLE:
            expected = ", ".join(sorted(TABLE))
            raise ValueError(f"backend: expected an op among {expected}, got {op!r}")
        if name not in NAMES:
            raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")


_forced: dict[str, str] = _parsed(os.environ.get("SIMPLCLIP_BACKEND", ""))


def forced() -> str:
    """Returns which backends are forced now, in the form of SIMPLCLIP_BACKEND; "" if none is."""
    return ",".join([f"{op}={name}" if op else name for op, name in _forced.items()])


def forced_for(op: str) -> str:
    """Returns the backend that is forced for a public op; "" if none is.

    Of an op that is composed of others, it returns theirs, with commas between them. A part without
    the backend that is forced for all ops is free.
    """
    if not _forced:
        return ""
    for_all = _forced.get("", "")
    if op not in PARTS:
        return _forced.get(op, for_all)
    names = []
    for part in PARTS[op]:
        free = for_all in NAMES and for_all not in TABLE[part]
        names.append(_forced.get(part, "" if free else for_all))
    return ",".join(names)


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
    by_op = {
        "similarity_loss": similarity_loss,
        "shaped_attention": shaped_attention,
        "parallel_mlp": parallel_mlp,
    }
    merged = {"": name} if name else dict(_forced)
    merged |= {op: value for op, value in by_op.items() if value is not None}
    _check(merged)
    before = _forced
    _forced = merged
    try:
        yield
    finally:
        _forced = before
