"""The figures in the CSV files of a run: curves.png, and whether a held-out loss rises."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from simplclip.common.errors import InputError
from simplclip.common.files import read_csv
from simplclip.common.plotting import Panel, write_panels
from simplclip.train.objective import terms_of

DIRECTIONS = {"image_to_text": "to text", "text_to_image": "to image"}
NAMES = ("split", "direction")  # columns of evaluation.csv without figures
RISE = 0.1  # share by which a held-out loss is above its lowest, in two evaluations, for a warning
# panels of curves.png whose y axis need not begin at 0
SCALES = ("Logit scale", "Gradient norm before clipping", "Logit bias")


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
    losses, terms = ["loss"], terms_of(rows[0])
    if len(terms) > 1:
        losses += terms
    columns = {
        "Loss": losses,
        "Learning rate": ["lr"],
        "Logit scale": ["logit_scale"],
        "Gradient norm before clipping": ["grad_norm"],
        "Logit bias": ["logit_bias"],
    }
    panels = [
        Panel(title, _series(rows, names), from_zero=title not in SCALES)
        for title, names in columns.items()
        if names[0] in rows[0]
    ]
    splits = dict.fromkeys(row["split"] for row in evaluated)
    for position, split in enumerate(splits, 1):
        split_rows = [row for row in evaluated if row["split"] == split]
        panels.insert(position, _recalls(split, split_rows))
        if "loss" in split_rows[0]:
            losses_by_step = {row["step"]: row for row in split_rows}  # one for both directions
            panels[0].lines[split] = _series([*losses_by_step.values()], ["loss"])["loss"]
    write_panels(run / "curves.png", panels, _best_step(evaluated))


def _recalls(split: str, rows: list[dict[str, str]]) -> Panel:
    """Returns the panel of R@k of a split, from its rows of evaluation.csv."""
    title = f"{split}: right one among the first k; dotted: chance"
    panel = Panel(title, {}, {}, percent=True, solid=3)
    for direction, words in DIRECTIONS.items():
        directed = [row for row in rows if row["direction"] == direction]
        if not directed:  # a crash may have cut off its row
            continue
        for column in [column for column in directed[0] if column.startswith("R@")]:
            (line,) = _series(directed, [column]).values()
            panel.lines[f"{words} {column}"] = line
            if f"chance {column}" in directed[0]:
                panel.chance[f"{words} {column}"] = float(directed[-1][f"chance {column}"])
    return panel


def _best_step(evaluated: list[dict[str, str]]) -> int | None:
    """Returns the first step of the highest R@1, averaged over the rows of a step."""
    recalls: dict[int, list[float]] = {}
    for row in evaluated:
        recalls.setdefault(int(row["step"]), []).append(float(row["R@1"]))
    means = {step: sum(values) / len(values) for step, values in recalls.items()}
    return max(means, key=lambda step: (means[step], -step), default=None)


def _series(
    rows: list[dict[str, str]], columns: list[str]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns steps and values of each column, by its label; an empty value becomes NaN."""
    steps = np.array([int(row["step"]) for row in rows])
    terms = terms_of(columns)
    lines = {}
    for column in columns:
        label = terms.get(column, column).replace("_", " ")
        lines[label] = steps, np.array([float(row[column] or "nan") for row in rows])
    return lines
