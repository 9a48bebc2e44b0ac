"""`simplclip doctor` and simplclip.report(): which backend runs each op on this machine, and why other backends do not."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from typing import Annotated

import typer

from simplclip.version import __version__

LONG = 197  # tokens of an attention that is reported beside a short one
FIRST_HOUR = (  # docs/first-hour.md
    "simplclip selftest            compares each op on each backend of this machine with float64",
    "python -m benchmarks.gpu      measures all of them and a training step (in a checkout)",
)
PACKAGES = ("torch", "triton", "open_clip_torch", "timm", "webdataset", "numpy")


def doctor(
    why: Annotated[bool, typer.Option("--why", help="Show for each op why the other backends do not run it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Print versions, CPU, GPU, and which backend runs each op on this machine."""
    data = report()
    typer.echo(json.dumps(data, indent=2) if as_json else render(data, why))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> dict:
    import torch

    from simplclip.ops import backends

    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        return {"available": False, "reason": f"torch {torch.__version__} ({built}) sees no device"}
    properties = torch.cuda.get_device_properties(0)
    gpu = {"available": True, "name": properties.name, "memory_bytes": properties.total_memory}
    gpu["capability"] = f"{properties.major}.{properties.minor}"
    if backends.cuda_extension is not None and not backends.cuda_extension.binary_version(0):
        built = backends.cuda_extension.architectures()
        gpu["reason"] = f"this build's kernels ({built}) do not run on it: rebuild with TORCH_CUDA_ARCH_LIST"
    return gpu


def _extension() -> dict:
    from simplclip.ops import backends

    cpu = {"loaded": False, "reason": backends.extension_error}
    cuda = {"loaded": False, "reason": backends.cuda_extension_error}
    if extension := backends.extension:
        cpu = {"loaded": True, "compiler": extension.compiler(), "instruction_set": extension.cpu_isa()}
        cpu["native_bfloat16"] = backends.native_bf16
    if backends.cuda_extension:
        cuda = {"loaded": True, "architectures": backends.cuda_extension.architectures()}
    return {"cpu": cpu, "cuda": cuda}


def report() -> dict:
    """Returns versions, CPU, GPU, extensions, the backend of each op for float32 CPU and CUDA tensors, and why no other runs.

    Attention has a second entry, "long", with 197 tokens, since the backend depends on the number of tokens.
    The report contains only plain types, so that it can be written as JSON.
    """
    import torch

    from simplclip.ops import backends

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
        "ops": {
            name: {device: _backend(op, device, facts) for device in ("cpu", "cuda")}
            for op in backends.TABLE
            for name, facts in _cases(op)
        },
    }


def _cases(op: str) -> list[tuple[str, dict]]:
    """Returns the name of each reported call of an op, with the facts that the choice of its backend depends on."""
    return [(op, {}), *([(f"{op}, long", {"length": LONG})] if op.startswith("shaped_attention") else [])]


def _backend(op: str, device: str, facts: dict) -> dict:
    import torch

    from simplclip.ops import backends

    serves = problem = None
    kind = torch.device(device)
    try:
        serves, _ = backends.select(op, kind, torch.float32, backends.forced(), **facts)
    except (RuntimeError, ValueError) as error:
        problem = str(error)
    reasons = {}
    for name in (name for name in backends.NAMES if name != serves):
        passed_over = serves is None or backends.NAMES.index(name) < backends.NAMES.index(serves)
        free = f"can run; {'another is forced' if passed_over else f'{serves} comes first'}"
        reasons[name] = backends.why_not(op, name, kind, torch.float32, **facts) or free
    return {"backend": serves, "error": problem, "others": reasons}


def render(data: dict, why: bool = False) -> str:
    """Returns the report as text for a terminal. why: add the reasons why the other backends do not run each op."""
    cpu, gpu, kernels, cuda_kernels = data["cpu"], data["gpu"], data["extension"]["cpu"], data["extension"]["cuda"]
    built = kernels.get("reason")
    if kernels["loaded"]:
        bf16 = "bfloat16 products in hardware" if kernels["native_bfloat16"] else "bfloat16 computed in float32"
        built = f"{kernels['instruction_set']}, {bf16}; built by {kernels['compiler']}"
    card = gpu.get("reason")
    if gpu["available"]:
        card = f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.1f} GiB, compute capability {gpu['capability']}"
    rows = [
        ("simplclip", f"{data['simplclip']}, Python {data['python']}, {data['platform']}"),
        ("packages", ", ".join(f"{name} {version or '(not installed)'}" for name, version in data["packages"].items())),
        ("CPU", f"{cpu['threads']} threads on {cpu['cores']} cores, torch uses {cpu['torch_instruction_set']}"),
        ("CPU kernels", built),
        ("CUDA kernels", cuda_kernels.get("reason") or f"for {cuda_kernels['architectures']}"),
        ("GPU", card),
    ]
    if gpu["available"] and "reason" in gpu:
        rows.append(("", gpu["reason"]))
    if data["forced_backend"]:
        rows.append(("forced", f"{data['forced_backend']}, by SIMPLCLIP_BACKEND or simplclip.backend"))
    lines = [f"{name:<13}{text}" for name, text in rows]
    lines += ["", f"{'op':<28}{'float32 CPU tensor':<20}float32 CUDA tensor"]
    for op, devices in data["ops"].items():
        cells = [entry["backend"] or "error" for entry in devices.values()]
        lines.append(f"{op:<28}{cells[0]:<20}{cells[1]}")
        for device, entry in devices.items() if why else ():
            lines += [f"    {device}: {entry['error']}"] if entry["error"] else []
            lines += [f"    {device}: not {name}: {reason}" for name, reason in entry["others"].items()]
    return "\n".join([*lines, "", *FIRST_HOUR])
