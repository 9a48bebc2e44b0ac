"""The tables and the picture of an ablation, from the results of its runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from simplclip.common.plotting import COLOURS, INK, MUTED, new_figure, style, write

DIRECTIONS = ("image_to_text", "text_to_image")
ALL = "all"  # the mean over the splits

Result = Mapping[str, Any]  # of a run: its result.json, and "run" and "seed"


def run_rows(result: Result) -> Iterator[dict[str, Any]]:
    """Yields a row for each split and direction of a run."""
    for split, entry in result["splits"].items():
        for direction in DIRECTIONS:
            row: dict[str, Any] = {"run": result["run"], "seed": result["seed"], "steps": result["step"]}
            row |= {"split": split, "direction": direction}
            row |= {k: round(figure["value"], 6) for k, figure in entry[direction].items()}
            yield row | {f"chance of {k}": round(figure["chance"], 6) for k, figure in entry[direction].items()}


def value(result: Result, measure: str, split: str = ALL) -> float:
    """Returns R@1 (mean of both directions) or AUC in per cent, of a split or the mean over all; nan without a figure."""
    splits = result["splits"].values() if split == ALL else [result["splits"][split]]
    if measure == "R@1":
        return 100 * statistics.fmean(entry[direction]["R@1"]["value"] for entry in splits for direction in DIRECTIONS)
    return 100 * statistics.fmean(entry.get(measure, math.nan) for entry in splits)


def effect_rows(group: str, effect: str, pairs: Sequence[Mapping[str, Result]]) -> Iterator[dict[str, Any]]:
    """Yields rows for R@1 over all splits, R@1 of each split, and AUC over all splits. A row has mean and standard deviation
    of base and variant, and their paired difference over the seeds.

    pairs: for each finished seed, the results of "base" (none for a variant that is only reported) and "variant".
    """
    for measure, split in (("R@1", ALL), *(("R@1", split) for split in pairs[0]["variant"]["splits"]), ("AUC", ALL)):
        figures = [{side: value(result, measure, split) for side, result in pair.items()} for pair in pairs]
        figures = [pair for pair in figures if not any(map(math.isnan, pair.values()))]
        row: dict[str, Any] = {"group": group, "effect": effect, "measure": measure, "split": split, "seeds": len(figures)}
        if not figures:
            continue
        columns = {side: [pair[side] for pair in figures if side in pair] for side in ("base", "variant")}
        for side, values in columns.items():
            row[side] = _round(statistics.fmean(values)) if values else ""
            row[f"{side} std"] = _round(statistics.stdev(values)) if len(values) > 1 else ""
        row |= _compared(columns["base"], columns["variant"])
        for side in columns:
            mine = [pair[side] for pair in pairs if side in pair]
            row[f"{side} steps"] = mine[0]["step"] if mine else ""
            row[f"{side} s/step"] = _round(statistics.median(r["seconds_per_step"] for r in mine)) if mine else ""
            row[f"{side} parameters"] = mine[0]["parameters"] if mine else ""
        yield row


def _compared(base: Sequence[float], variant: Sequence[float]) -> dict[str, Any]:
    """Returns the paired difference of variant and base, its t-test and the 95 % interval of its mean; "" without a base."""
    row = dict.fromkeys(("difference", "difference std", "t", "p", "low", "high"), "")
    differences = [b - a for a, b in zip(base, variant)]
    if differences:
        row["difference"] = _round(statistics.fmean(differences))
    if len(differences) > 1:
        test = stats.ttest_rel(variant, base)
        low, high = test.confidence_interval()
        row |= {"difference std": _round(statistics.stdev(differences)), "t": _round(test.statistic)}
        row |= {"p": _round(test.pvalue, 6), "low": _round(low), "high": _round(high)}
    return row


def _round(value: float | None, digits: int = 3) -> float | str:
    return "" if value is None or value != value else round(float(value), digits)


def draw(path: str | Path, rows: Sequence[Mapping[str, Any]], title: str) -> Path | None:
    """Draws the paired differences of all effects with their 95 % intervals, by group, the largest first.

    rows: those of effects.csv; a row without a difference is left out. Returns None if no row is left.
    """
    rows = [row for row in rows if (row["measure"], row["split"]) == ("R@1", ALL) and row["difference"] != ""]
    if not rows:
        return None
    groups = list(dict.fromkeys(row["group"] for row in rows))
    lines: list[Mapping[str, Any] | str] = []
    for group in groups:
        lines += [group, *sorted((r for r in rows if r["group"] == group), key=lambda row: -float(row["difference"]))]
    height = 1.5 + 0.27 * len(lines)
    figure = new_figure(11.5, height)
    axis = figure.add_axes((0.42, 0.55 / height, 0.44, 1 - 1.35 / height))
    style(axis, "")
    axis.axvline(0, color=INK, linewidth=0.9)
    cut = 2.5 * max(abs(float(row["difference"])) for row in rows) or 1.0  # longer intervals leave the picture
    ends = {row["effect"]: [float(row[end]) for end in ("low", "high")] for row in rows if row["low"] != ""}
    shown = [0.0, *(float(row["difference"]) for row in rows), *(end for pair in ends.values() for end in pair)]
    left, right = max(min(shown), -cut), min(max(shown), cut)
    margin = 0.04 * (right - left) or 1.0
    axis.set_xlim(left - margin, right + margin)
    for place, line in enumerate(lines):
        beside = {"transform": axis.get_yaxis_transform(), "color": INK, "va": "center"}
        say = lambda x, text, size, **more: axis.text(x, place, text, fontsize=size, **beside | more)  # noqa: E731, B023
        if isinstance(line, str):
            say(-0.94, line, 10, fontweight="bold")
            continue
        value, colour = float(line["difference"]), COLOURS[groups.index(line["group"]) % len(COLOURS)]
        if line["effect"] in ends:
            axis.plot(ends[line["effect"]], [place, place], color=colour, linewidth=1.4, alpha=0.7)
        axis.plot([value], [place], "o", color=colour, markersize=5)
        say(-0.92, line["effect"], 9)
        said = f"{value:+.2f}" + (f"  p {float(line['p']):.3f}" if line["p"] != "" else "") + f"  n {line['seeds']}"
        say(1.02, said, 8, color=MUTED)
    axis.set_ylim(len(lines) - 0.5, -0.7)
    axis.set_yticks([])
    axis.set_xlabel("difference of R@1, points: mean and 95 % interval of the paired difference over seeds", color=MUTED)
    figure.suptitle(title, color=INK, fontsize=13, fontweight="bold", x=0.02, y=1 - 0.25 / height, ha="left", va="top")
    return write(figure, Path(path))
