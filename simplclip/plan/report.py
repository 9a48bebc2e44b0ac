"""The command `simplclip plan`: a plan as a table that grows row by row, or as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from simplclip.plan.cards import GIB, parse_memory
from simplclip.plan.count import WEIGHTS
from simplclip.plan.search import Budget, Planner, Row, gib
from simplclip.train.config import Config

COLUMNS = ("peak", "weights", "activations", "loss", "other")  # in GiB


def run(
    config: Config, memory: str, *, device: str = "cuda", teacher_width: int | None = None, as_json: bool = False
) -> None:
    """Prints the plan of `config`, and its progress to stderr. In JSON sizes are in bytes. Raises the errors of `Planner`."""

    def tell(line: str) -> None:
        print(f"    {line}", file=sys.stderr, flush=True)

    planner = Planner(config, Budget(parse_memory(memory)), device, teacher_width, tell)
    budget = planner.budget
    if as_json:
        values: dict[str, Any] = {"model": config.model.name, "precision": planner.precision, "device": device}
        values |= {"memory": budget.memory, "usable": budget.usable, "rows": [asdict(row) for row in planner.rows()]}
        print(json.dumps(values | {"assumptions": planner.assumptions}, indent=2))
        return
    print(f"{config.model.name}, {planner.precision}, {device}: {gib(budget.usable)} usable of {gib(budget.memory)}; "
          "sizes in GiB at the peak, with\nweights: parameters, their gradients, averages and optimizer state\n")  # fmt: skip
    print(f"{'step':<28}{'pairs':>10} {'at a time':>16}" + "".join(f"{name:>13}" for name in COLUMNS) + "  fits")
    for row in planner.rows():
        print(line(row), flush=True)
    measured = "nothing: predicted from fake tensors" + ", no step ran on a GPU" * (device == "cuda")
    print(f"\nmeasured   {measured}")
    for assumption in planner.assumptions:
        print(f"assumed    {assumption}")


def line(row: Row) -> str:
    """Returns a row of the table."""
    pairs, at_a_time = f"{row.batch_size:,}" + "+" * row.at_least, f"{row.micro_batch:,}" if row.micro_batch else "all"
    parts = {name: row.components.get(name, 0) for name in ("activations", "loss")}
    sizes: dict[str, int] = {"peak": row.peak, "weights": sum(row.components.get(kind, 0) for kind in WEIGHTS), **parts}
    sizes["other"] = row.peak - sizes["weights"] - sum(parts.values())
    cells = "".join(f"{sizes[name] / GIB:>13.2f}" for name in COLUMNS)
    return f"{row.what:<28}{pairs:>10} {at_a_time:>16}{cells}  {'yes' if row.fits else 'no'}"
