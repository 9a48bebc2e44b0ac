"""The command `simplclip tune`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from simplclip.commands.options import Kind, Overrides, kind_of
from simplclip.common.errors import InputError


def tune(
    config: Annotated[
        str | None,
        typer.Argument(help="YAML file or name of a built-in config, as in train, for its sizes. Default: CLIP's"),
    ] = None,
    *,
    set_: Overrides = None,
    device: Kind = "auto",
    show: Annotated[bool, typer.Option("--show", help="Print what was chosen before; measure nothing.")] = False,
    reset: Annotated[bool, typer.Option("--reset", help="Forget what was chosen: the defaults are in force again.")] = False,
) -> None:
    """Measure the forms of each op on this machine and keep the fastest for later runs. Takes a minute or two.

    Nothing else should run meanwhile. What is kept holds for this device, driver, torch, Triton and version of simplclip.
    """
    kind = kind_of(device)
    if config is None and set_:
        raise InputError("--set: expected a CONFIG whose values it replaces, got none")
    from rich.console import Console

    from simplclip import tune as tuning
    from simplclip.common import machine
    from simplclip.common.tuned import SECTION

    console = Console()
    if reset:
        if machine.known(SECTION, kind):
            tuning.store(kind, {})
        console.print(f"{kind}: the defaults are in force")
        return
    if show:
        found = machine.known(SECTION, kind)
        if not found:
            console.print(f"{kind}: not tuned: simplclip tune")
            return
    else:
        sizes = tuning.standard(kind)
        if config is not None:
            from simplclip.train import config as configs

            sizes = tuning.sizes_of(configs.load(config, set_ or ()), kind)
        with Console(stderr=True).status("measuring") as status:
            found = tuning.tune(kind, sizes, lambda name: status.update(f"measuring: {name}"))
    _print(found, console)
    console.print(f"{found['date']}, in {machine.path(kind)}", highlight=False, soft_wrap=True)


def _print(found: dict[str, Any], console: Any) -> None:
    from simplclip.common.tables import table

    def ms(row: dict[str, Any]) -> str:
        each = ((_short(name), of) for name, of in row["candidates"].items())
        return ", ".join(f"{name} {of:,.2f}" if isinstance(of, float) else f"{name}: {of}" for name, of in each)

    rows = [(row["choice"], _short(row["default"]), _short(row["chosen"]), ms(row)) for row in found["measured"]]
    console.print(table(("choice", "default", "chosen", "ms"), rows))


def _short(value: Any) -> str:
    """Writes a number of bytes in MiB; another value as it is."""
    return f"{int(value) >> 20} MiB" if str(value).isdigit() else str(value)
