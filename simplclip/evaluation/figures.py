"""The results of an evaluation as a table, each figure with its chance."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from simplclip.evaluation.results import Figure, Recall, Results, SplitResult
from simplclip.evaluation.retrieval import KS


def table(results: Results) -> Table:
    """Returns a table of all figures in per cent, which fits a terminal of 80 columns.

    Each column is a k of KS. Figures of several models stand above their common chance.
    """
    models = results.models
    several = len(models) > 1
    title = results.model
    if results.step is not None:
        title += f", step {results.step}"
    if several:
        title = f"{len(models)} models"
    caption = "share found among the first k"
    shown = Table(title=title, caption=caption, box=SIMPLE_HEAD, pad_edge=False)
    shown.add_column("split", overflow="fold", max_width=14)
    shown.add_column("among", no_wrap=True)
    shown.add_column("model" if several else "", overflow="fold")
    for k in KS:
        shown.add_column(f"@{k}", justify="right", no_wrap=True)
    for split in results.splits:
        heading = escape(split)
        rows = [_rows(model.splits[split]) for model in models]
        # by their places, since another model may have skipped another number of images
        for (among, figures), *others in zip(*(row.items() for row in rows)):
            first, second = heading, among
            for model, row in zip(models, [figures, *(other for _, other in others)]):
                name = escape(model.checkpoint) if several else ""
                values = [percent(figure.value) for figure in row]
                shown.add_row(first, second, name, *values)
                first = second = heading = ""
            chances = [percent(figure.chance) for figure in figures]
            shown.add_row("", "  chance", "", *chances, style="dim")
        shown.add_section()
    return shown


def _rows(result: SplitResult) -> dict[str, list[Figure]]:
    """Returns the figures of the table's rows for one split, by what is searched."""
    rows = {}
    if retrieval := result.retrieval:
        rows[f"{result.texts} texts"] = list(retrieval.image_to_text.values())
        rows[f"{result.images} images"] = list(retrieval.text_to_image.values())
    if classification := result.zero_shot:
        classes = f"{len(classification.classes)} classes"
        rows[classes] = [classification.top1, classification.top5]
        rows["mean per class"] = [classification.mean_per_class]
    return rows


def percent(share: float) -> str:
    """Returns a share as "12.3%"; below 0.0005 with one significant digit, as "0.002%"."""
    if share >= 5e-4 or not share:
        return f"{share:.1%}"
    digit = float(f"{100 * share:.1g}")
    return f"{digit:.7f}".rstrip("0") + "%"


def in_words(figures: Recall, among: int) -> str:
    """Returns R@k of one direction as a line, e.g. "R@1 12.3%, ... of 1000 (chance 0.1, ...%)"."""
    values = ", ".join(f"{name} {percent(figure.value)}" for name, figure in figures.items())
    chance = ", ".join(percent(figure.chance).rstrip("%") for figure in figures.values())
    return f"{values} of {among} (chance {chance}%)"
