"""The command `simplclip plan`: a plan as a table that grows row by row, or as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from simplclip.memory.count import WEIGHTS
from simplclip.memory.plan import GIB, Budget, Planner, Row, gib, parse_memory
from simplclip.train.config import Config

COLUMNS = ("peak", "weights", "activations", "loss", "other")  # in GiB


def run(
    config: Config, memory: str, *, device: str = "cuda", teacher_width: int | None = None, as_json: bool = False
) -> None:
    """Prints the plan of `config`, and its progress to stderr. Raises the errors of `Planner`."""

    def tell(line: str) -> None:
        print(f"    {line}", file=sys.stderr, flush=True)

    planner = Planner(config, Budget(parse_memory(memory)), device, teacher_width, tell)
    if as_json:
        print(json.dumps(as_dict(planner, list(planner.rows())), indent=2))
        return
    usable = f"{gib(planner.budget.usable)} usable of {gib(planner.budget.memory)}"
    print(f"{config.model.name}, {planner.precision}, {device}: {usable}; sizes in GiB at the peak, with\n"
          "weights: parameters, their gradients, averages and optimizer state\n")  # fmt: skip
    print(f"{'step':<28}{'pairs':>10} {'at a time':>16}" + "".join(f"{name:>13}" for name in COLUMNS) + "  fits")
    for row in planner.rows():
        print(line(row), flush=True)
    measured = "nothing: predicted from fake tensors" + ", no step ran on a GPU" * (device == "cuda")
    print(f"\nmeasured   {measured}")
    for assumption in planner.assumptions:
        print(f"assumed    {assumption}")


def line(row: Row) -> str:
    """Returns a row of the table."""
    pairs = f"{row.batch_size:,}" + "+" * row.at_least
    parts = {name: row.components.get(name, 0) for name in ("activations", "loss")}
    sizes: dict[str, int] = {"peak": row.peak, "weights": sum(row.components.get(kind, 0) for kind in WEIGHTS), **parts}
    sizes["other"] = row.peak - sizes["weights"] - sum(parts.values())
    cells = "".join(f"{sizes[name] / GIB:>13.2f}" for name in COLUMNS)
    return f"{row.what:<28}{pairs:>10} {_at_a_time(row.micro_batch):>16}{cells}  {'yes' if row.fits else 'no'}"


def as_dict(planner: Planner, rows: list[Row]) -> dict[str, Any]:
    """The plan as JSON; sizes are in bytes."""
    values: dict[str, Any] = {"model": planner.config.model.name, "precision": planner.precision}
    values |= {"device": planner.device.type, "memory": planner.budget.memory, "usable": planner.budget.usable}
    return values | {"rows": [asdict(row) for row in rows], "assumptions": planner.assumptions}


def _at_a_time(micro_batch: int | dict[str, int | None] | None) -> str:
    if isinstance(micro_batch, dict):
        return ", ".join(f"{_at_a_time(size)} {tower}" for tower, size in micro_batch.items())
    return f"{micro_batch:,}" if micro_batch else "all"
