"""simplclip.report(): which backend runs each op on this machine, and why other backends do not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from simplclip.common import hardware
from simplclip.ops import backends, registry
from simplclip.version import __version__

LONG = 197  # tokens of an attention that is reported beside a short one
PACKAGES = ("torch", "triton", "open_clip_torch", "timm", "webdataset", "numpy")


def report() -> dict[str, Any]:
    """Returns versions, CPU, GPU, extensions, and for each op the backend of CPU and CUDA tensors,
    and why no other runs.

    Tensors have the dtype that training takes on the device; without a GPU it is bfloat16.
    Attention has a second entry, "long", with 197 tokens, since the backend depends on the number
    of tokens. The report contains only plain types, so that it can be written as JSON.
    """
    # entry -> public op, and the facts that the choice of its backend depends on
    calls: dict[str, tuple[str, backends.Facts]] = {}
    for name, op in registry.OPS.items():
        if op.public in backends.TABLE:
            calls[name] = op.public, backends.NO_FACTS
        if op.public == "shaped_attention":
            calls[f"{name}, long"] = op.public, backends.Facts(length=LONG)
    return {
        "simplclip": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {
            "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
        },
        "gpu": gpu(),
        "extension": {"cpu": _cpu_extension(), "cuda": _cuda_extension()},
        "forced_backend": backends.forced() or None,
        "ops": {
            name: {
                device: _backend(op, torch.device(device), dtype, facts)
                for device, dtype in (("cpu", _dtype("cpu")), ("cuda", _dtype("cuda")))
            }
            for name, (op, facts) in calls.items()
        },
    }


def _version(package: str) -> str | None:
    """Returns the version of an installed package, or None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu() -> dict[str, Any]:
    """Returns what is known of GPU 0, as plain types; "reason" says why it cannot be used."""
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        return {"available": False, "reason": f"torch {torch.__version__} ({built}) sees no device"}
    properties = torch.cuda.get_device_properties(0)
    facts: dict[str, Any] = {
        "available": True,
        "name": properties.name,
        "memory_bytes": properties.total_memory,
    }
    facts["capability"] = f"{properties.major}.{properties.minor}"
    if backends.cuda_extension is not None:
        reason = backends.extension_on_cuda(torch.device("cuda", 0), torch.float32)
        if reason:
            facts["reason"] = f"the CUDA extension {reason}"
    return facts


def _cpu_extension() -> dict[str, Any]:
    """Returns whether simplclip._C is loaded, with its compiler, or the "reason" why not."""
    extension = backends.extension
    if extension is None:
        return {"loaded": False, "reason": backends.extension_error}
    facts = {
        "loaded": True,
        "compiler": extension.compiler(),
        "instruction_set": extension.cpu_isa(),
    }
    return facts | {"native_bfloat16": backends.native_bf16}


def _cuda_extension() -> dict[str, Any]:
    """Returns "loaded", and "architectures" of simplclip._C_cuda or the "reason" of its absence."""
    if backends.cuda_extension is None:
        return {"loaded": False, "reason": backends.cuda_extension_error}
    return {"loaded": True, "architectures": backends.cuda_extension.architectures()}


def _dtype(device: str) -> torch.dtype:
    """Returns the dtype of a training on "cpu" or "cuda" whose run.precision is auto."""
    if device == "cuda" and not torch.cuda.is_available():
        return torch.bfloat16
    precision, _ = hardware.pick_precision("auto", torch.device(device))
    return hardware.DTYPES[precision] or torch.float32


def _backend(
    op: str, device: torch.device, dtype: torch.dtype, facts: backends.Facts
) -> dict[str, Any]:
    """Returns the backend that runs such calls of an op on a device, and why no other does."""
    selected = problem = None
    try:
        selected = backends.select(op, device, dtype, backends.forced_for(op), facts)
    except (RuntimeError, ValueError) as error:
        problem = str(error)
    reasons = {}
    free = "can run; another is forced"
    for name in backends.NAMES:
        if name == selected:  # the backends after it could run, but come later
            free = f"can run; {selected} comes first"
            continue
        reasons[name] = backends.why_not(op, name, device, dtype, facts) or free
    name = str(dtype).removeprefix("torch.")
    return {"dtype": name, "backend": selected, "error": problem, "others": reasons}
