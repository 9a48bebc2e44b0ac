"""The command `simplclip doctor`."""

from __future__ import annotations

import json
import os
import time
from typing import Annotated, Any

import typer

from simplclip.commands.app import app
from simplclip.commands.plan import read_planned_config
from simplclip.common.errors import InputError

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
    compile_: Annotated[
        str | None,
        typer.Option(
            "--compile",
            metavar="CONFIG",
            help="Instead of a report, compile the Triton kernels of training into Triton's cache. "
            "CONFIG: as in plan, or a run's folder.",
        ),
    ] = None,
    card: Annotated[
        str | None,
        typer.Option(help="With --compile: the card, rtx-3090 or a100-40 ...; no GPU is needed."),
    ] = None,
) -> None:
    """Print versions, CPU, GPU, and which backends run the ops on this machine."""
    if compile_ is not None:
        if why or as_json:
            raise InputError("--compile: expected neither --why nor --json, got one of them")
        typer.echo(compile_kernels(compile_, card))
        return
    if card is not None:
        raise InputError(f"--card: expected --compile CONFIG beside it, got {card!r} alone")
    from simplclip.ops.report import report

    machine = report()
    typer.echo(json.dumps(machine, indent=2) if as_json else render(machine, why))


def compile_kernels(source: str, card: str | None) -> str:
    """Compiles the Triton kernels of a config's training steps; returns a line about them."""
    from simplclip.models.naming import check_name
    from simplclip.plan.cards import CARDS, GIB, named
    from simplclip.train import config as configs

    began = time.monotonic()
    path = os.path.join(source, "config.yaml") if os.path.isdir(source) else source
    values = configs.from_dict(read_planned_config(path))
    check_name(values.model.name, "model.name")
    name = None if card is None else named(card)
    cards = [name for name, each in CARDS.items() if each.triton]
    if card is not None and name not in cards:
        raise InputError(f"--card: expected one of {', '.join(cards)}, got {card!r}")
    import torch

    from simplclip.ops import backends

    device = torch.device("cuda", 0)
    capability = backends.capability(device)
    if name is None and capability is None:
        raise InputError("--card: expected a card, since this machine has no GPU, got none")
    if not backends.installed("triton"):
        raise InputError("--compile: expected the package triton, which is not installed")
    import triton

    from simplclip.common.progress import Progress, duration
    from simplclip.plan.compile import compile_launches, forms_of
    from simplclip.plan.search import Budget, Planner

    if name is not None:
        budget = Budget(CARDS[name].memory * GIB)
        architecture = CARDS[name].architecture
    elif capability is not None:
        budget = Budget.of(device)
        architecture = 10 * capability[0] + capability[1]
    forms = forms_of(Planner(values, budget, card=name).launches())
    with Progress("compile", len(forms), unit="kernels") as progress:
        count, found = compile_launches(forms, architecture, progress.update)
    return (
        f"{count} kernels of {values.model.name} for sm_{architecture} in "
        f"{triton.knobs.cache.dir}, {found} of which were there; "
        f"{duration(time.monotonic() - began)}"
    )


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
