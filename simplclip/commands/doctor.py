"""The command `simplclip doctor`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from simplclip.commands.app import app


@app.command(
    short_help="Show which backend runs each op on this machine.",
    epilog="Example: simplclip doctor --why",
)
def doctor(
    why: Annotated[
        bool, typer.Option("--why", help="List the backend of each op, and why no other runs it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Print versions, CPU, GPU, and which backends run the ops on this machine."""
    from simplclip.ops.report import report

    machine = report()
    typer.echo(json.dumps(machine, indent=2) if as_json else render(machine, why))


def render(machine: dict[str, Any], why: bool = False) -> str:
    """Returns the report of `simplclip.ops.report` as text for a terminal; why: as `--why`."""
    cpu, gpu, ops = machine["cpu"], machine["gpu"], machine["ops"]
    kernels, cuda = machine["extension"]["cpu"], machine["extension"]["cuda"]
    cpu_kernels = kernels.get("reason")
    if kernels["loaded"]:
        bf16 = "products in hardware" if kernels["native_bfloat16"] else "computed in float32"
        cpu_kernels = (
            f"{kernels['instruction_set']}, bfloat16 {bf16}; built by {kernels['compiler']}"
        )
    card = gpu.get("reason")
    if gpu["available"]:
        memory = f"{gpu['memory_bytes'] / 2**30:.1f} GiB"
        card = f"{gpu['name']}, {memory}, compute capability {gpu['capability']}"
        if "reason" in gpu:
            card += f"; {gpu['reason']}"
    packages = [
        f"{name} {version or '(not installed)'}" for name, version in machine["packages"].items()
    ]
    rows = {
        "simplclip": f"{machine['simplclip']}, Python {machine['python']}, {machine['platform']}",
        "packages": ", ".join(packages),
        "CPU": f"{cpu['threads']} threads on {cpu['cores']} cores, torch uses "
        f"{cpu['torch_instruction_set']}",
        "CPU kernels": cpu_kernels,
        "CUDA kernels": cuda.get("reason") or f"for {cuda['architectures']}",
        "GPU": card,
        "forced": machine["forced_backend"],  # by SIMPLCLIP_BACKEND or simplclip.backend
        "CPU tensors": _served(ops, "cpu"),
        "CUDA tensors": _served(ops, "cuda"),
    }
    lines = [f"{name:<14}{text}" for name, text in rows.items() if text] + [""]
    for op, devices in ops.items() if why else ():
        for device, entry in devices.items():
            lines.append(f"{op}, {device}: {entry['backend'] or entry['error']}")
            lines += [f"    not {name}: {reason}" for name, reason in entry["others"].items()]
    return "\n".join([*lines, "What to run first on a machine: docs/first-hour.md"])


def _served(ops: dict[str, Any], device: str) -> str:
    """Returns a line: backends of the ops on a device, each with the number of its ops, dtypes."""
    names = [devices[device]["backend"] or "none" for devices in ops.values()]
    counts = ", ".join(f"{names.count(name)} ops by {name}" for name in dict.fromkeys(names))
    dtypes = {devices[device]["dtype"] for devices in ops.values()}
    return f"{counts}, in {', '.join(dtypes)}, as in training"
