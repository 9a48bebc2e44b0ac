"""The output of a run: a folder and a zip of it, with rows, environment, predictions beside measurements, and pictures."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import simplclip
from benchmarks import hardware
from benchmarks.results_file import table, write_csv
from simplclip.common.files import write_atomically
from simplclip.common.plotting import COLOURS, INK, MUTED, new_figure, style, write

# Pairs of columns that are compared: measured, predicted.
COMPARED = (("ms", "predicted_ms"), ("mib", "predicted_mib"), ("pairs", "predicted_pairs"))
OFF = 1 / 3  # differences above this share of the prediction are reported


def compared(rows: list[dict]) -> list[dict]:
    """Returns a row for each prediction, the worst first. `off` is the relative difference where it exceeds a third."""
    found = []
    for row in rows:
        for measured, predicted in COMPARED:
            if row.get(measured) and row.get(predicted):
                ratio = float(row[measured]) / float(row[predicted])
                what = {"case": row["case"], "form": row["form"], "what": measured}
                what |= {"measured": row[measured], "predicted": row[predicted], "times": round(ratio, 2)}
                found.append(what | {"off": f"{ratio - 1:+.0%}" if abs(ratio - 1) > OFF else ""})
    return sorted(found, key=lambda row: -max(row["times"], 1 / max(row["times"], 1e-9)))


def environment(device: str) -> dict[str, Any]:
    packages = {found.metadata["Name"]: found.version for found in importlib.metadata.distributions()}
    known = {"where": hardware.describe(device), "gpu": hardware.gpu_state(), "doctor": simplclip.report()}
    return {"command": sys.argv, **known, "packages": dict(sorted(packages.items()))}


def write_bundle(folder: Path, device: str, rows: list[dict], left: int) -> list[str]:
    """Writes all files but rows.csv, and the zip beside the folder. Returns the lines of the summary."""
    against = compared(rows)
    off = [row for row in against if row["off"]]
    failed = [{"case": row["case"], "form": row["form"], "note": row["note"]} for row in rows if row.get("note")]
    where = hardware.describe(device)
    lines = [f"{where['hardware']}, torch {where['torch']}, simplclip {where['simplclip']}, commit {where['commit']}", ""]
    lines += [f"{len(rows)} rows; {left} cases were left for the next call."]
    if against:
        lines += ["", f"Measured against predicted: {len(off)} of {len(against)} are off by more than a third.", *table(off)]
        write_csv(folder / "predictions.csv", against)
    if failed:
        lines += ["", f"{len(failed)} forms have no figure:", *table(failed)]
    write_atomically(folder / "summary.txt", "\n".join(lines) + "\n")
    write_atomically(folder / "environment.json", json.dumps(environment(device), indent=2) + "\n")
    draw(folder, rows, against)
    shutil.make_archive(str(folder), "zip", folder.parent, folder.name)
    return lines


def draw(folder: Path, rows: list[dict], against: list[dict]) -> None:
    """Draws losses.png, the losses' times by N, and predictions.png, the measured figures against the predicted ones."""
    losses = [row for row in rows if row.get("op") == "similarity_loss" and row.get("p50_ms")]
    losses = [row for row in losses if row["dtype"] == losses[0]["dtype"]]
    objectives = list(dict.fromkeys(row["objective"] for row in losses))
    if objectives:
        figure = new_figure(5.5 * len(objectives), 4.8)
        axes = figure.subplots(1, len(objectives), squeeze=False)[0]
        for axis, objective in zip(axes, objectives):
            forms = list(dict.fromkeys(row["form"] for row in losses if row["objective"] == objective))
            for place, form in enumerate(forms):
                of_form = [row for row in losses if (row["objective"], row["form"]) == (objective, form)]
                points = sorted((int(row["n"]), float(row["p50_ms"])) for row in of_form)
                axis.plot(*zip(*points), "o-", color=COLOURS[place % len(COLOURS)], markersize=3, label=form)
            logarithmic(axis, f"{objective}, {losses[0]['dtype']}", "pairs", "ms, forward and backward")
        write(figure, folder / "losses.png")
    if against:
        figure = new_figure(6.2, 5.4)
        axis = figure.subplots()
        for place, (measured, _) in enumerate(COMPARED):
            points = [(float(row["predicted"]), float(row["measured"])) for row in against if row["what"] == measured]
            if points:
                axis.plot(*zip(*points), "o", color=COLOURS[place], markersize=3, label=measured)
        ends = sorted(float(row[side]) for row in against for side in ("predicted", "measured"))
        axis.plot([ends[0], ends[-1]], [ends[0], ends[-1]], "-", color=MUTED, linewidth=0.8)
        logarithmic(axis, "measured against predicted", "predicted", "measured")
        write(figure, folder / "predictions.png")


def logarithmic(axis: Any, title: str, x: str, y: str) -> None:
    style(axis, title)
    axis.set(xscale="log", yscale="log")
    axis.set_xlabel(x, color=MUTED)
    axis.set_ylabel(y, color=MUTED)
    axis.legend(frameon=False, fontsize=7, labelcolor=INK)
