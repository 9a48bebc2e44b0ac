"""The commands that look at this machine: `simplclip doctor` and `simplclip selftest`."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from simplclip.commands.app import app
from simplclip.common.errors import InputError, visible
from simplclip.common.files import write_atomically

if TYPE_CHECKING:
    import torch


@app.command(epilog="Example: simplclip doctor --why")
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


@app.command(epilog="Example: simplclip selftest --json selftest.json")
def selftest(
    device: Annotated[
        Literal["auto", "cuda", "cpu"], typer.Option(help="auto: a GPU if there is one.")
    ] = "auto",
    as_json: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Write the results and this machine's report, for an issue.",
        ),
    ] = None,
) -> None:
    """Compare each op on each backend of this machine with float64.

    Exits with 1 if something is wrong.

    An error is in units of the tolerance: at most 1 is right. What is wrong is named with the
    variable that avoids it.
    """
    from simplclip import selftest
    from simplclip.common.hardware import pick_device
    from simplclip.ops.report import report

    # "." of a folder is there, that of a file is not
    if as_json is not None and (as_json.is_dir() or not os.access(f"{as_json.parent}/.", os.W_OK)):
        raise InputError(f"--json: expected a file in a folder that can be written, got {as_json}")
    began, rows = time.monotonic(), []
    typer.echo(f"{'op':<18}{'backend':<15}{'dtype':<10}{'calls':>5}{'error':>8}")
    for row in selftest.check_ops(pick_device(device)):
        error = "FAILED" if row.failures else f"{row.worst:.2f}"
        typer.echo(f"{row.op:<18}{row.backend:<15}{_name(row.dtype):<10}{row.calls:>5}{error:>8}")
        rows.append(row)
    failed = [row for row in rows if row.failures]
    for row in failed:
        typer.echo(f"\n{row.op}, {row.backend}, {_name(row.dtype)}:")
        for failure in row.failures:
            typer.echo(f"    {visible(failure)}")
        if row.backend != "reference" and row.parts:
            avoided = ",".join(f"{op}=reference" for op in dict.fromkeys(row.parts))
            typer.echo(f"    SIMPLCLIP_BACKEND={avoided} avoids it")
    if as_json is not None:
        written = [{**asdict(row), "dtype": _name(row.dtype)} for row in rows]
        write_atomically(
            as_json,
            json.dumps({"passed": not failed, "rows": written, "environment": report()}, indent=2),
        )
    calls, seconds = sum(row.calls for row in rows), time.monotonic() - began
    typer.echo(f"\n{calls} calls in {seconds:.0f} s: {'FAILED' if failed else 'all are right'}")
    if failed:
        raise typer.Exit(1)


def _name(dtype: torch.dtype) -> str:
    """Returns a torch dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")
