"""simplclip.report() and `simplclip doctor`: what runs where on this machine, and why not something else."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from simplclip.ops import backends
from simplclip.version import __version__

PACKAGES = ("torch", "triton", "open_clip_torch", "timm", "webdataset", "numpy")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> dict:
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        return {"available": False, "reason": f"torch {torch.__version__} ({built}) sees no device"}
    properties = torch.cuda.get_device_properties(0)
    gpu = {"available": True, "name": properties.name, "memory_bytes": properties.total_memory}
    if backends.cuda_extension is not None:
        gpu["limits"] = backends.cuda_extension.device_limits(0)
        if not gpu["limits"]["binary_version"]:
            built = backends.cuda_extension.architectures()
            gpu["reason"] = f"this build's kernels ({built}) do not run there: rebuild with TORCH_CUDA_ARCH_LIST"
    return gpu


def _extension() -> dict:
    info: dict = {
        "cpu": {"loaded": backends.extension is not None},
        "cuda": {"loaded": backends.cuda_extension is not None},
    }
    if backends.extension is None:
        info["cpu"]["reason"] = backends.extension_error
    else:
        info["cpu"]["compiler"] = backends.extension.compiler()
        info["cpu"]["instruction_set"] = backends.extension.cpu_isa()
        info["cpu"]["native_bfloat16"] = backends.native_bf16
    if backends.cuda_extension is None:
        info["cuda"]["reason"] = backends.cuda_extension_error
    else:
        info["cuda"]["architectures"] = backends.cuda_extension.architectures()
    return info


def report() -> dict:
    """Versions, CPU, GPU, extension, and for each op the backend that serves a float32 CPU and CUDA tensor, and why no other.

    Only plain types, so that it can be written as JSON.
    """
    ops: dict = {}
    for op in backends.TABLE:
        ops[op] = {}
        for device in ("cpu", "cuda"):
            try:
                serves, _ = backends.select(op, device, torch.float32, backends.forced())
                problem = None
            except (RuntimeError, ValueError) as error:
                serves, problem = None, str(error)
            others = {
                name: backends.why_not(op, name, device, torch.float32)
                or f"can serve; {'another is forced' if backends.forced() else f'{serves} comes first'}"
                for name in backends.NAMES
                if name != serves
            }
            ops[op][device] = {"backend": serves, "error": problem, "others": others}
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
        "gpu": _gpu(),
        "extension": _extension(),
        "forced_backend": backends.forced() or None,
        "ops": ops,
    }


def render(data: dict) -> str:
    """The report as text for a terminal."""
    lines = [f"simplclip {data['simplclip']}, Python {data['python']}, {data['platform']}"]
    lines.append("packages   " + ", ".join(f"{k} {v or 'not installed'}" for k, v in data["packages"].items()))
    cpu, extension, gpu = data["cpu"], data["extension"], data["gpu"]
    lines.append(f"cpu        {cpu['threads']} threads on {cpu['cores']} cores, torch uses {cpu['torch_instruction_set']}")
    if extension["cpu"]["loaded"]:
        bf16 = "bfloat16 products in hardware" if extension["cpu"]["native_bfloat16"] else "bfloat16 computed as float32"
        lines.append(
            f"extension  CPU kernels: {extension['cpu']['instruction_set']}, {bf16}; built by {extension['cpu']['compiler']}"
        )
    else:
        lines.append(f"extension  no CPU kernels: {extension['cpu']['reason']}")
    cuda = extension["cuda"]
    lines.append(
        f"           CUDA objects for {cuda['architectures']}"
        if cuda["loaded"]
        else f"           no CUDA objects: {cuda['reason']}"
    )
    if gpu["available"]:
        lines.append(f"gpu        {gpu['name']}, {gpu['memory_bytes'] / 2**30:.1f} GiB")
        if "limits" in gpu:
            lines.append("           " + ", ".join(f"{k} {v}" for k, v in gpu["limits"].items()))
    if "reason" in gpu:
        lines.append(f"gpu        {gpu['reason']}")
    if data["forced_backend"]:
        lines.append(f"forced     {data['forced_backend']} (SIMPLCLIP_BACKEND or simplclip.backend)")
    for op, devices in data["ops"].items():
        lines.append(op)
        for device, entry in devices.items():
            lines.append(f"  {device:5} {entry['backend'] or entry['error']}")
            lines += [f"        not {name}: {reason}" for name, reason in entry["others"].items()]
    return "\n".join(lines)
