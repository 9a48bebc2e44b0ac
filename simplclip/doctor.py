"""simplclip.report() and `simplclip doctor`: which backend runs each op on this machine, and why no other."""

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


_LIMITS = {
    "major": "major",
    "minor": "minor",
    "multiprocessors": "multi_processor_count",
    "shared_bytes_per_block": "shared_memory_per_block_optin",
    "shared_bytes_per_multiprocessor": "shared_memory_per_multiprocessor",
    "registers_per_multiprocessor": "regs_per_multiprocessor",
}


def _gpu() -> dict:
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        return {"available": False, "reason": f"torch {torch.__version__} ({built}) sees no device"}
    properties = torch.cuda.get_device_properties(0)
    gpu = {"available": True, "name": properties.name, "memory_bytes": properties.total_memory}
    if backends.cuda_extension is not None:
        gpu["limits"] = {name: getattr(properties, attribute) for name, attribute in _LIMITS.items()}
        gpu["limits"]["binary_version"] = backends.cuda_extension.binary_version(0)
        if not gpu["limits"]["binary_version"]:
            built = backends.cuda_extension.architectures()
            gpu["reason"] = f"this build's kernels ({built}) do not run on it: rebuild with TORCH_CUDA_ARCH_LIST"
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
    """Versions, CPU, GPU, extensions, and the backend that runs each op for float32 CPU and CUDA tensors, and why no other.

    It contains only plain types, so that it can be written as JSON.
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
                or f"can run; {'another is forced' if backends.forced() else f'{serves} comes first'}"
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


def render(data: dict, why: bool = False) -> str:
    """The report as text for a terminal. why: add the reasons why the other backends do not run each op."""
    cpu, extension, gpu = data["cpu"], data["extension"], data["gpu"]
    rows = [
        ("simplclip", f"{data['simplclip']}, Python {data['python']}, {data['platform']}"),
        ("packages", ", ".join(f"{name} {version or '(not installed)'}" for name, version in data["packages"].items())),
        ("CPU", f"{cpu['threads']} threads on {cpu['cores']} cores, torch uses {cpu['torch_instruction_set']}"),
        ("CPU kernels", _cpu_kernels(extension["cpu"])),
        (
            "CUDA kernels",
            f"for {extension['cuda']['architectures']}" if extension["cuda"]["loaded"] else extension["cuda"]["reason"],
        ),
        ("GPU", f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.1f} GiB" if gpu["available"] else gpu["reason"]),
    ]
    if gpu["available"] and "reason" in gpu:
        rows.append(("", gpu["reason"]))
    if "limits" in gpu:
        rows.append(("", ", ".join(f"{name} {value}" for name, value in gpu["limits"].items())))
    if data["forced_backend"]:
        rows.append(("forced", f"{data['forced_backend']}, by SIMPLCLIP_BACKEND or simplclip.backend"))
    lines = [f"{name:<13}{text}" for name, text in rows]
    lines += ["", f"{'op':<24}{'float32 CPU tensor':<20}float32 CUDA tensor"]
    for op, devices in data["ops"].items():
        cells = [entry["backend"] or "error" for entry in devices.values()]
        lines.append(f"{op:<24}{cells[0]:<20}{cells[1]}")
        for device, entry in devices.items() if why else ():
            lines += [f"    {device}: {entry['error']}"] if entry["error"] else []
            lines += [f"    {device}: not {name}: {reason}" for name, reason in entry["others"].items()]
    return "\n".join(lines)


def _cpu_kernels(info: dict) -> str:
    if not info["loaded"]:
        return info["reason"]
    bf16 = "bfloat16 products in hardware" if info["native_bfloat16"] else "bfloat16 computed in float32"
    return f"{info['instruction_set']}, {bf16}; built by {info['compiler']}"
