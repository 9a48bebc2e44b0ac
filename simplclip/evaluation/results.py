"""The results of evaluations, which are the content of evaluation.json, and their table.

They are plain dicts, whose keys these types name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from simplclip.common.files import write_atomically

KS = (1, 5, 10)


class Figure(TypedDict):
    """A share, and what the share would be by chance."""

    value: float
    chance: float


Recall = dict[str, Figure]  # by "R@1", "R@5" and "R@10"


class Classification(TypedDict):
    """Zero-shot accuracies over the labels of a split."""

    classes: list[str]
    images: int  # that have a label
    templates: list[str]
    top1: Figure
    top5: Figure
    mean_per_class: Figure


class SplitResult(TypedDict):
    """The figures of a model on a split."""

    images: int
    texts: int
    image_to_text: NotRequired[Recall]  # both: only if an image has a caption
    text_to_image: NotRequired[Recall]
    zero_shot: Classification | None  # None: no image has a label
    left_out: list[str]  # what has no figures, and why
    contact_sheet: str | None  # path of the picture


class Results(TypedDict):
    """The figures of a model by split, and those of others by the sources that were given."""

    checkpoint: str
    model: str
    step: int | None  # None: not of a run
    precision: str
    versions: NotRequired[dict[str, str]]  # of this library and of torch; only of the first model
    splits: dict[str, SplitResult]
    baselines: NotRequired[dict[str, Results]]


def first_right(result: SplitResult) -> Figure:
    """Returns the share of queries whose first answer is right.

    It is the mean R@1 of both directions, or top 1 without captions.
    """
    if "image_to_text" not in result:
        assert result["zero_shot"] is not None  # an evaluation has one of them
        return result["zero_shot"]["top1"]
    a, b = result["image_to_text"]["R@1"], result["text_to_image"]["R@1"]
    return {"value": (a["value"] + b["value"]) / 2, "chance": (a["chance"] + b["chance"]) / 2}


def write_json(file: Path, results: Mapping[str, Any]) -> None:
    """Replaces `file` by the results as UTF-8 JSON, completely or not at all."""
    text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    write_atomically(file, text.encode("utf-8", "backslashreplace"))


def table(results: Results) -> Table:
    """Returns a table of all figures in per cent, which fits a terminal of 80 columns.

    Each column is a k of KS. Figures of several models stand above their common chance.
    """
    models = [results, *results.get("baselines", {}).values()]
    title = f"{len(models)} models"
    if len(models) == 1:
        title = results["model"] + ("" if results["step"] is None else f", step {results['step']}")
    caption = "share found among the first k"
    shown = Table(title=title, caption=caption, box=SIMPLE_HEAD, pad_edge=False)
    shown.add_column("split", overflow="fold", max_width=14)
    shown.add_column("among", no_wrap=True)
    shown.add_column("model" if models[1:] else "", overflow="fold")
    for k in KS:
        shown.add_column(f"@{k}", justify="right", no_wrap=True)
    for split in results["splits"]:
        heading = escape(split)
        # by their places, since another model may have skipped another number of images
        for rows in zip(*(_rows(model["splits"][split]) for model in models)):
            among, figures = rows[0]
            for model, (_, values) in zip(models, rows):
                name = escape(model["checkpoint"]) if models[1:] else ""
                shares = [percent(figure["value"]) for figure in values]
                shown.add_row(heading, among, name, *shares)
                heading = among = ""
            chances = [percent(figure["chance"]) for figure in figures]
            shown.add_row("", "  chance", "", *chances, style="dim")
        shown.add_section()
    return shown


def _rows(result: SplitResult) -> list[tuple[str, list[Figure]]]:
    """Returns what is searched in each of the table's rows for one split, and its figures."""
    rows = []
    if "image_to_text" in result:
        rows.append((f"{result['texts']} texts", list(result["image_to_text"].values())))
        rows.append((f"{result['images']} images", list(result["text_to_image"].values())))
    if found := result["zero_shot"]:
        rows.append((f"{len(found['classes'])} classes", [found["top1"], found["top5"]]))
        rows.append(("mean per class", [found["mean_per_class"]]))
    return rows


def percent(share: float) -> str:
    """Returns a share as "12.3%"; below 0.0005 with one significant digit, as "0.002%"."""
    return f"{share:.1%}" if share >= 5e-4 or not share else f"{100 * share:.1g}%"


def in_words(figures: Recall, among: int) -> str:
    """Returns R@k of one direction as a line, e.g. "R@1 12.3%, ... of 1000 (chance 0.1, ...%)"."""
    values = ", ".join(f"{name} {percent(figure['value'])}" for name, figure in figures.items())
    chance = ", ".join(percent(figure["chance"]).rstrip("%") for figure in figures.values())
    return f"{values} of {among} (chance {chance}%)"
