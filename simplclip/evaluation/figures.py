"""The results of an evaluation as a table, each figure with its chance."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from simplclip.evaluation.results import Figure, Recall, Results, SplitResult
from simplclip.evaluation.retrieval import KS


def table(results: Results) -> Table:
    """Returns the figures in per cent, for 80 columns.

    Figures of several models stand above their common chance.
    """
    models = results.models
    several = len(models) > 1
    title = results.first.model
    if results.first.step is not None:
        title += f", step {results.first.step}"
    if several:
        title = f"{len(models)} models"
    shown = Table(
        title=title,
        caption="share found among the first k",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    shown.add_column("split", overflow="fold", max_width=14)
    shown.add_column("among", no_wrap=True)
    shown.add_column("model" if several else "", overflow="fold")
    for k in KS:
        shown.add_column(f"@{k}", justify="right", no_wrap=True)
    for split in results.first.splits:
        heading = escape(split)
        rows = [_rows(model.splits[split]) for model in models]
        for among, figures in rows[0].items():
            first, second = heading, among
            for model, row in zip(models, rows):
                name = escape(model.checkpoint) if several else ""
                values = [percent(figure.value) for figure in row[among]]
                shown.add_row(first, second, name, *values)
                first = second = heading = ""
            chances = [percent(figure.chance) for figure in figures]
            shown.add_row("", "  chance", "", *chances, style="dim")
        shown.add_section()
    return shown


def _rows(result: SplitResult) -> dict[str, list[Figure]]:
    """Returns the figures of each row of the table by what they are among."""
    rows = {}
    if retrieval := result.retrieval:
        rows[f"{result.texts} texts"] = list(retrieval.image_to_text.values())
        rows[f"{result.images} images"] = list(retrieval.text_to_image.values())
    if classification := result.classification:
        classes = f"{len(classification.classes)} classes"
        rows[classes] = [classification.top1, classification.top5]
        rows["mean per class"] = [classification.mean_per_class]
    return rows


def percent(share: float) -> str:
    """Writes a share in per cent, as "12.3%"; a small share with one significant digit, as
    "0.002%".
    """
    if share >= 5e-4 or not share:
        return f"{share:.1%}"
    digit = float(f"{100 * share:.1g}")
    return f"{digit:.7f}".rstrip("0") + "%"


def in_words(figures: Recall, among: int) -> str:
    """Returns the figures and their chance as one line of text for a picture."""
    values = ", ".join(f"{name} {percent(figure.value)}" for name, figure in figures.items())
    chance = ", ".join(percent(figure.chance).rstrip("%") for figure in figures.values())
    return f"{values} of {among} (chance {chance}%)"
