"""The command `simplclip selftest`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simplclip.commands.doctor import report
from simplclip.commands.options import Kind, kind_of
from simplclip.common.errors import visible
from simplclip.common.files import write_atomically

if TYPE_CHECKING:
    from simplclip.selftest import Row


def selftest(
    device: Kind = "auto",
    quick: Annotated[
        bool, typer.Option("--quick/--full", help="A choice of sizes and options, or ten times as many.")
    ] = True,
    reset: Annotated[bool, typer.Option("--reset", help="Bring back what earlier runs took out, and test nothing.")] = False,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the results and this machine's report, for an issue.")
    ] = None,
) -> None:
    """Prove each op on each backend of this machine, and take out backends that fail; the next backend then serves here.

    Exits with 1 if something failed. The numbers are the largest errors in units of the tolerance: at most 1 is right.
    """
    kind = kind_of(device)
    from simplclip import selftest
    from simplclip.common import machine

    before = machine.known("failed", kind)
    if reset:
        if before:
            machine.store("failed", kind, {})
        typer.echo(f"{kind}: {'brought back: ' + ', '.join(before) if before else 'nothing was taken out'}")
        return
    began, described = time.monotonic(), machine.describe(kind)
    typer.echo(", ".join(f"{name} {value}" for name, value in described.items()))
    total = len(selftest.rows_of(kind, not quick, selftest.DRAW))
    rows = list(_shown(selftest.survey(kind, full=not quick), total))
    found = selftest.taken_out(rows)
    failed = any(row.failures for row in rows)
    seconds = time.monotonic() - began
    typer.echo(_table(rows, list(selftest.PRECISIONS)))
    for row in rows:
        for failure in row.failures:
            typer.echo(f"{row.op}, {row.backend}, {row.precision}: {visible(failure.what)}")
            if failure.call:
                typer.echo(f"    {failure.call}")
    if found:
        machine.store("failed", kind, {**before, **found})
    if as_json is not None:
        result: dict[str, Any] = {"passed": not failed, "full": not quick, "seconds": seconds, "machine": described}
        result |= {"taken_out": found, "rows": [asdict(row) for row in rows], "environment": report()}
        write_atomically(as_json, json.dumps(result, indent=2, allow_nan=False))
    typer.echo(f"{sum(row.calls for row in rows)} calls in {seconds:.0f} s: {'FAILED' if failed else 'all are right'}")
    for name in {**before, **found}:
        typer.echo(f"{'taken out' if name in found else 'taken out by an earlier run'}: {name}")
    if before or found:
        typer.echo("The next backend serves in their place on this machine; simplclip selftest --reset brings them back.")
    if failed:
        raise typer.Exit(1)


def _shown(rows: Iterator[Row], total: int) -> Iterable[Row]:
    try:
        from simplclip.common.progress import Progress
    except ModuleNotFoundError:  # tqdm comes with the extras
        return rows
    return Progress("selftest", total, unit="rows").over(rows)


def _table(rows: list[Row], precisions: list[str]) -> str:
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        cells.setdefault((row.op, row.backend), {})[row.precision] = "FAILED" if row.failures else f"{row.worst:.2f}"
    shown = [name for name in precisions if any(name in of_row for of_row in cells.values())]
    lines = [f"{'op':<18}{'backend':<15}{''.join(f'{name:>10}' for name in shown)}"]
    for (op, backend), of_row in cells.items():
        lines.append(f"{op:<18}{backend:<15}{''.join(f'{of_row.get(name, str()):>10}' for name in shown)}")
    return "\n".join(["", *lines, ""])
