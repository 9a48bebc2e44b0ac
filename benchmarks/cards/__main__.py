"""Predicts step times on cards, without one, beside those that timm's authors measured.

    python -m benchmarks.cards
        the committed selection; writes a result file and docs/plan_cards.svg
    python -m benchmarks.cards --fit
        fits the constants of simplclip/plan/time.py to its rows with fitted = yes, as a result file
    python -m benchmarks.cards --file steps.csv --mode train --layout nhwc --card rtx-3090
            [--models resnet50 ...]
        a file of measured steps
    python -m benchmarks.cards --cpu siclip-tiny siclip-lite0
        a lower bound of a step on this CPU, and the step
    python -m benchmarks.cards --call contrastive --n 65536 --card rtx-3090
        a lower bound of a call of this library
    python -m benchmarks.cards --call all
        of all calls on several cards, as a result file

The last line is a JSON object. Of measured steps it has "models" (steps), "below_bound" (the share
that was faster than the predicted least), "median_ratio" (measured by likely), "median_error" and
"within_35" (the share predicted to 35 %).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cards import bound, chart, cpu
from benchmarks.cards.fit import Measured, fit, held_out
from benchmarks.cards.models import kernels
from benchmarks.results_file import RESULTS, ROOT, read_csv, table, versions, write_csv
from simplclip.plan.cards import CARDS
from simplclip.plan.time import FITTED, step_time

SELECTION = RESULTS / "cards-measured.csv"
CHART = ROOT / "docs" / "plan_cards.svg"


def steps_of(options: argparse.Namespace) -> list[Measured]:
    """Returns the steps of the file; for a fit, without rows that were drawn to check one.

    Columns that it lacks come from the options.
    """
    steps = []
    for row in read_csv(options.file):
        if options.models and row["model"] not in options.models:
            continue
        if options.fit and row.get("fitted") == "no":
            continue
        card, mode, layout = (
            row.get(name) or getattr(options, name) for name in ("card", "mode", "layout")
        )
        batch, size, ms = int(row["batch"]), int(row["size"]), float(row["ms"])
        steps.append(Measured(card, mode, layout, row["model"], batch, size, ms))
    return steps


def count(steps: Sequence[Measured]) -> list[Measured]:
    """Counts the kernels of the steps; returns those whose model runs on fake tensors."""
    counted = dict[tuple, list]()
    for number, step in enumerate(steps):
        key = step.model, step.batch, step.size, step.mode, step.layout
        try:
            counted[key] = step.kernels = counted.get(key) or kernels(*key)
        except Exception as error:  # of any kind, from code of the model
            reason = str(error).split("\n")[0]
            print(f"{step.model}: not counted: {type(error).__name__}: {reason}", file=sys.stderr)
        if number % 20 == 19:
            print(f"    {number + 1} of {len(steps)} steps", file=sys.stderr, flush=True)
    return [step for step in steps if step.kernels]


def summary(
    measured: Sequence[float], likely: Sequence[float], least: Sequence[float]
) -> dict[str, float]:
    errors = [abs(guess / ms - 1) for ms, guess in zip(measured, likely)]
    ratios = [ms / guess for ms, guess in zip(measured, likely)]
    below_bound = sum(ms < bound for ms, bound in zip(measured, least))
    within = sum(error <= 0.35 for error in errors)
    return {
        "models": len(errors),
        "below_bound": round(below_bound / len(errors), 4),
        "median_ratio": round(statistics.median(ratios), 4),
        "median_error": round(statistics.median(errors), 4),
        "within_35": round(within / len(errors), 4),
    }


def compare(steps: Sequence[Measured]) -> list[dict]:
    """Returns a row for each step, with the likely and the least milliseconds predicted."""
    rows = []
    for step in steps:
        time = step_time(step.kernels, CARDS[step.card])
        names = ("card", "mode", "layout", "model", "batch", "size", "ms")
        row = {name: getattr(step, name) for name in names}
        rows.append(row | {"likely_ms": round(time.likely, 2), "least_ms": round(time.least, 2)})
    return rows


def grouped(rows: Sequence[dict]) -> list[dict]:
    """Returns the summary for each card, mode and layout."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["card"], row["mode"], row["layout"]), []).append(row)
    names = ("card", "mode", "layout")
    return [dict(zip(names, key)) | summary(*columns(part)) for key, part in sorted(groups.items())]


def columns(rows: Sequence[dict]) -> tuple[tuple[float, ...], ...]:
    """Returns the measured, likely and least milliseconds of the rows."""
    names = ("ms", "likely_ms", "least_ms")
    return tuple(tuple(row[name] for row in rows) for name in names)


def write_fit(steps: Sequence[Measured]) -> dict[str, float]:
    """Fits the constants, writes and prints them; returns the summary of families held out."""
    fitted, where = fit(steps), versions()
    rows = [row | {"likely_ms": ms} for row, ms in zip(compare(steps), held_out(steps))]
    errors = held_out_errors(rows)
    constants = {
        "rate": fitted.rates,
        "traffic": fitted.traffic,
        "launch": {"ms": fitted.launches},
        "held out": errors,
    }
    lines = []
    for constant, kinds in constants.items():
        for kind, values in kinds.items():
            lines.append({"of": constant, "kind": kind, **dict(zip(FITTED, values))})
    write_csv(RESULTS / f"cards-fit-{where['date']}.csv", [line | where for line in lines])
    printed = {"RATES": fitted.rates, "TRAFFIC": fitted.traffic, "HELD_OUT": errors}
    for title, kinds in printed.items():
        print(f"{title} = {{")
        for kind, values in kinds.items():
            print(f"    {json.dumps(kind)}: {values},")
        print("}")
    print(f"LAUNCHES_MS = {fitted.launches}")
    print("\n".join(table(grouped(rows))))
    return summary(*columns(rows))


def held_out_errors(rows: Sequence[dict]) -> dict[str, tuple[float | None, ...]]:
    """Returns median_error and within_35 of both modes for each card of FITTED, where measured."""
    figures: dict[str, list[float | None]] = {}
    for mode, card in itertools.product(("train", "infer"), FITTED):
        part = [row for row in rows if (row["card"], row["mode"]) == (card, mode)]
        total = summary(*columns(part)) if part else {}
        for name in ("median_error", "within_35"):
            figure = round(total[name], 3) if total else None
            figures.setdefault(f"{mode} {name}", []).append(figure)
    return {name: tuple(values) for name, values in figures.items()}


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(
        "python -m benchmarks.cards", description=__doc__, formatter_class=raw
    )
    made.add_argument(
        "--file",
        type=Path,
        help="CSV of model,batch,size,ms, and card, mode, layout unless options name them",
    )
    made.add_argument("--mode", choices=("train", "infer"))
    made.add_argument("--layout", choices=("nchw", "nhwc"), help="nhwc: channels_last")
    made.add_argument("--card", choices=CARDS)
    made.add_argument("--models", nargs="+", help="of the file, by default all")
    made.add_argument("--fit", action="store_true", help="fit the constants")
    made.add_argument(
        "--cpu", nargs="+", metavar="MODEL", help="models whose step is measured on this CPU"
    )
    bound.add_arguments(made)
    return made


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    if options.call:
        return bound.run(options)
    if options.cpu:
        lines = cpu.run(options.cpu)
        print("\n".join(table(lines)))
        print(json.dumps(lines))
        return None
    selection = options.file is None
    options.file = options.file or SELECTION
    steps = count(steps_of(options))
    if options.fit:
        print(json.dumps(write_fit(steps)))
        return None
    rows = compare(steps)
    print("\n".join(table(rows if len(rows) < 60 else grouped(rows))))
    if selection and not options.models:
        where = versions()
        path = RESULTS / f"cards-{where['date']}.csv"
        write_csv(path, [row | where for row in rows])
        CHART.write_text(chart.draw(rows, str(path.relative_to(ROOT))))
        print(f"wrote {path} and {CHART}")
    print(json.dumps(summary(*columns(rows))))
    return None


if __name__ == "__main__":
    main()
