"""The command `simplclip plan`."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from simplclip.memory import report
from simplclip.memory.cards import parse_memory
from simplclip.memory.picture import draw
from simplclip.memory.plan import Plan, make
from simplclip.train.config import Config
from simplclip.train.limits import Budget


def run(
    config: Config,
    memory: str,
    *,
    device: str = "cuda",
    teacher_width: int | None = None,
    compare: bool = False,
    picture: Path | None = None,
    as_json: bool = False,
) -> Plan:
    """Makes the plan and prints it; progress is printed to stderr. Raises the errors of `plan.make`."""
    progress = Console(stderr=True)
    budget = Budget(parse_memory(memory))
    with progress.status("planning") as status:
        plan = make(
            config, budget, device=device, teacher_width=teacher_width, compare=compare, show=lambda line: status.update(line)
        )
    console = Console()
    if as_json:
        print(json.dumps(report.as_dict(plan), indent=2))
    else:
        report.show(plan, console)
    if picture:
        draw(picture, plan)
        progress.print(f"wrote {picture}", highlight=False)
    return plan
