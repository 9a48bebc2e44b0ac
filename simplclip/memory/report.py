"""A plan as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from simplclip.memory.count import KINDS
from simplclip.memory.plan import Plan
from simplclip.train.limits import GIB, gib


def show(plan: Plan, console: Console) -> None:
    """Prints tables of the answers and of the memory at the peak, assumptions and advice."""
    budget = plan.budget
    console.print(
        f"{plan.model}, {plan.precision}, {plan.device}: {gib(budget.usable)} usable of {gib(budget.memory)}", highlight=False
    )
    answers = Table("step", "pairs", "at a time", "peak", "fits", "next larger, GiB", box=None, pad_edge=False)
    for column in answers.columns[1:]:
        column.justify = "right"
    for answer in plan.answers:
        answers.add_row(
            answer.what,
            f"{answer.batch_size:,}",
            f"{answer.micro_batch:,}" if answer.micro_batch else "all",
            gib(answer.peak),
            "yes" if plan.holds(answer) else "no",
            "" if answer.next_peak is None else f"{answer.next_batch_size:,}: {answer.next_peak / GIB:.2f}",
        )
    console.print(answers)
    at = plan.usage
    parts = Table(f"at the peak, in {at.peak_phase}", "MiB", "share", box=None, pad_edge=False)
    for column in parts.columns[1:]:
        column.justify = "right"
    for kind in KINDS:
        if kind in at.at_peak:
            size = at.at_peak[kind]
            parts.add_row(kind, f"{size / 2**20:,.1f}", f"{size / at.peak:.1%}")
    parts.add_row("total", f"{at.peak / 2**20:,.1f}", "100.0%")
    console.print()
    console.print(parts)
    console.print()
    for line in lines(plan):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def lines(plan: Plan) -> list[str]:
    """Lines on the measurement, the assumptions and the advice."""
    if plan.measured is not None:
        measured = f"measured   two real steps on this machine's GPU: {gib(plan.measured)}, predicted {gib(plan.usage.peak)}"
    elif plan.device == "cuda":
        measured = "measured   nothing: predicted from fake tensors, no step ran on a GPU"
    else:
        measured = "measured   nothing: predicted from fake tensors"
    out = [measured]
    out += [f"assumed    {note}" for note in (*plan.budget.assumptions(), *plan.notes)]
    out += [f"advice     {advice}" for advice in plan.advice or ("none: nothing known here would lower the peak",)]
    return out


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan without the timeline; sizes are in bytes."""
    return {
        "model": plan.model,
        "precision": plan.precision,
        "device": plan.device,
        "memory": plan.budget.memory,
        "usable": plan.budget.usable,
        "answers": [asdict(answer) | {"fits": plan.holds(answer)} for answer in plan.answers],
        "components": plan.usage.at_peak,
        "peak_phase": plan.usage.peak_phase,
        "measured": plan.measured,
        "assumptions": [*plan.budget.assumptions(), *plan.notes],
        "advice": list(plan.advice),
    }
