"""The command `simplclip doctor`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from simplclip.commands.app import app

FIRST_HOUR = (  # docs/first-hour.md
    "simplclip doctor --why        lists the backend of each op, and why no other runs",
    "simplclip selftest            compares each op on each backend of this machine with float64",
    "python -m benchmarks.gpu      measures all of them and a training step (in a checkout)",
)


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
    cpu = machine["cpu"]
    gpu = machine["gpu"]
    extension = machine["extension"]
    ops = machine["ops"]
    kernels = extension["cpu"]
    cpu_kernels = kernels.get("reason")
    if kernels["loaded"]:
        bf16 = "bfloat16 computed in float32"
        if kernels["native_bfloat16"]:
            bf16 = "bfloat16 products in hardware"
        cpu_kernels = f"{kernels['instruction_set']}, {bf16}; built by {kernels['compiler']}"
    cuda_kernels = extension["cuda"].get("reason")
    if not cuda_kernels:
        cuda_kernels = f"for {extension['cuda']['architectures']}"
    packages = [
        f"{name} {version or '(not installed)'}" for name, version in machine["packages"].items()
    ]
    threads = f"{cpu['threads']} threads on {cpu['cores']} cores"
    card = gpu.get("reason")
    if gpu["available"]:
        card = (
            f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.1f} GiB, compute capability "
            f"{gpu['capability']}"
        )
    rows = [
        ("simplclip", f"{machine['simplclip']}, Python {machine['python']}, {machine['platform']}"),
        ("packages", ", ".join(packages)),
        ("CPU", f"{threads}, torch uses {cpu['torch_instruction_set']}"),
        ("CPU kernels", cpu_kernels),
        ("CUDA kernels", cuda_kernels),
        ("GPU", card),
    ]
    if gpu["available"] and "reason" in gpu:
        rows.append(("", gpu["reason"]))
    if machine["forced_backend"]:
        rows.append(
            ("forced", f"{machine['forced_backend']}, by SIMPLCLIP_BACKEND or simplclip.backend")
        )
    rows += [(f"{device.upper()} tensors", _served(ops, device)) for device in ("cpu", "cuda")]
    lines = [f"{name:<14}{text}" for name, text in rows] + [""]
    if why:
        lines += _reasons(ops)
    return "\n".join([*lines, *FIRST_HOUR])


def _reasons(ops: dict[str, Any]) -> list[str]:
    """Returns a line for each op and device, and one for each backend that does not run it."""
    lines = []
    for op, devices in ops.items():
        for device, entry in devices.items():
            lines.append(f"{op}, {device}: {entry['backend'] or entry['error']}")
            lines += [f"    not {name}: {reason}" for name, reason in entry["others"].items()]
    return lines


def _served(ops: dict[str, Any], device: str) -> str:
    """Returns a line: backends of the ops on a device, each with the number of its ops, dtypes."""
    names = [devices[device]["backend"] or "none" for devices in ops.values()]
    counts = ", ".join(f"{names.count(name)} ops by {name}" for name in dict.fromkeys(names))
    dtypes = {devices[device]["dtype"] for devices in ops.values()}
    return f"{counts}, in {', '.join(dtypes)}, as in training"
