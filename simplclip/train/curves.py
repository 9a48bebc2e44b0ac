"""The figures in the CSV files of a run: curves.png, and whether a held-out loss rises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simplclip.common.errors import InputError
from simplclip.common.files import read_csv
from simplclip.common.plotting import GREY, any_text, shortened, write
from simplclip.train.objective import terms_of

Points = tuple[list[int], list[float]]  # steps and values of a line
NAMES = ("split", "direction")  # columns of evaluation.csv without figures
RISE = 0.1  # share by which a held-out loss is above its lowest, in two evaluations, for a warning
COLUMNS = ("lr", "logit_scale", "logit_bias", "grad_norm")  # with a panel of their own


def read_figures(path: Path) -> list[dict[str, str]]:
    """Returns the rows of a run's CSV file by column; [] if there is no file.

    Raises InputError for bytes that are no UTF-8, a step that is no integer, and other columns than
    NAMES that are no numbers.
    """
    try:
        rows = read_csv(path)
        for row in rows:
            int(row["step"])
            for name in row.keys() - NAMES:
                float(row[name] or "nan")
    except (ValueError, KeyError) as error:
        raise InputError(
            f"run.out: expected figures by step in {path}, got others ({error}); repair that file "
            "or move it away"
        ) from None
    return rows


def rise(evaluated: list[dict[str, str]], step: int) -> str | None:
    """Returns a text if a held-out loss is above its lowest by RISE, for the first time in a run.

    It is so in the last two evaluations, of which the second is that of `step`. evaluated: rows of
    evaluation.csv.
    """
    losses: dict[str, dict[int, float]] = {}  # by split and step
    for row in evaluated:
        losses.setdefault(row["split"], {})[int(row["step"])] = float(row.get("loss") or "nan")
    risen: dict[int, str] = {}
    for split, by_step in losses.items():
        steps = [*by_step]
        for before, (second, last) in enumerate(zip(steps[1:], steps[2:]), 1):
            lowest = min(steps[:before], key=by_step.__getitem__)
            if min(by_step[second], by_step[last]) > (1 + RISE) * by_step[lowest]:
                risen.setdefault(
                    last,
                    f"{split} loss {by_step[last]:.3f}: in two evaluations more than {RISE:.0%} "
                    f"above {by_step[lowest]:.3f}, its lowest, of step {lowest}; the model may "
                    "overfit, best.pt keeps the highest R@1",
                )
    return risen.get(step) if min(risen, default=None) == step else None


def write_curves(run: Path) -> None:
    """Draws RUN/curves.png from metrics.csv, unless it is empty, and evaluation.csv, if any."""
    rows, evaluated = read_figures(run / "metrics.csv"), read_figures(run / "evaluation.csv")
    if not rows:
        return
    # by panel and label: steps and values
    panels: dict[str, dict[str, Points]] = {"loss": {}}
    terms = terms_of(rows[0])
    for row in rows:
        _add(panels["loss"], "training", row, "loss")
        for column, term in terms.items() if len(terms) > 1 else ():
            _add(panels["loss"], term.replace("_", " "), row, column)
        for column in COLUMNS:
            _add(panels.setdefault(column, {}), column, row, column)
    for row in evaluated:
        _add(panels["loss"], row["split"], row, "loss")
        recalls = panels.setdefault(f"{row['split']} (dotted: chance)", {})
        for column in row:
            if column.startswith(("R@", "chance R@")):
                label = f"{row['direction']} {column}".replace("_", " ")
                _add(recalls, label, row, column)
    panels = {title: lines for title, lines in panels.items() if lines}
    with any_text():
        figure = Figure(figsize=(8, 2 * len(panels)), dpi=100, layout="constrained")
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axis, (title, lines) in zip(axes, panels.items()):
            _draw(axis, title, lines, _best_step(evaluated))
        axes[-1].set_xlabel("step; dashed: the best evaluation")
        write(figure, run / "curves.png")


def _add(lines: dict[str, Points], label: str, row: dict[str, str], column: str) -> None:
    """Adds the value that a row has in a column, if any, to the line of a label."""
    if row.get(column):
        steps, values = lines.setdefault(label, ([], []))
        steps.append(int(row["step"]))
        values.append(float(row[column]))


def _draw(axis: Axes, title: str, lines: dict[str, Points], best: int | None) -> None:
    """Draws the lines of a panel; those of chance are dotted, in the colours of the others."""
    colours: dict[str, Any] = {}
    for label, (steps, values) in lines.items():
        name = label.replace("chance ", "")
        is_chance = name != label
        (line,) = axis.plot(steps, values, ":" if is_chance else ".-", color=colours.get(name))
        colours[name] = line.get_color()
        if not is_chance:
            line.set_label(f"{shortened(label, 40)}: {values[-1]:.3g}")
    if best is not None:
        axis.axvline(best, color=GREY, linestyle="--", linewidth=1)
    axis.set_title(shortened(title, 90), fontsize=10, loc="left")
    axis.legend(fontsize=8, loc="upper left", ncols=2)
    axis.grid(alpha=0.3)


def _best_step(evaluated: list[dict[str, str]]) -> int | None:
    """Returns the first step of the highest R@1, averaged over the rows of a step."""
    recalls: dict[int, list[float]] = {}
    for row in evaluated:
        recalls.setdefault(int(row["step"]), []).append(float(row["R@1"]))
    means = {step: sum(values) / len(values) for step, values in recalls.items()}
    return max(means, key=lambda step: (means[step], -step), default=None)
