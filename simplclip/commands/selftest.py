"""The command `simplclip selftest`."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from simplclip.commands.app import app
from simplclip.common.errors import InputError, visible
from simplclip.common.files import write_atomically

if TYPE_CHECKING:
    import torch


@app.command(
    short_help="Check each op on each backend of this machine.",
    epilog="Example: simplclip selftest --json selftest.json",
)
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

    if as_json is not None and (as_json.is_dir() or not os.access(as_json.parent, os.W_OK)):
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
