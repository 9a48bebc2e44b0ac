"""The figures of an evaluation.json as a table, each with its chance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from simplclip.evaluation.retrieval import KS

Figure = Mapping[str, float]


def table(results: Mapping[str, Any]) -> Table:
    """Returns `evaluate`'s figures in per cent, for 80 columns.

    Figures of several models stand above their common chance.
    """
    models = [results, *results.get("baselines", {}).values()]
    title = (
        f"{results['model']}{'' if results['step'] is None else ', step ' + str(results['step'])}"
    )
    shown = Table(
        title=f"{len(models)} models" if models[1:] else title,
        caption="share found among the first k",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    shown.add_column("split", overflow="fold", max_width=14)
    shown.add_column("among", no_wrap=True)
    shown.add_column("model" if models[1:] else "", overflow="fold")
    for k in KS:
        shown.add_column(f"@{k}", justify="right", no_wrap=True)
    for split in results["splits"]:
        heading = escape(split)
        rows = [_rows(model["splits"][split]) for model in models]
        for among, figures in rows[0].items():
            first, second = heading, among
            for model, row in zip(models, rows):
                name = escape(str(model["checkpoint"])) if models[1:] else ""
                shown.add_row(
                    first, second, name, *(percent(figure["value"]) for figure in row[among])
                )
                first = second = heading = ""
            shown.add_row(
                "", "  chance", "", *(percent(figure["chance"]) for figure in figures), style="dim"
            )
        shown.add_section()
    return shown


def _rows(result: Mapping[str, Any]) -> dict[str, list[Figure]]:
    rows = {}
    for direction, among in (("image_to_text", "texts"), ("text_to_image", "images")):
        if direction in result:
            rows[f"{result[among]} {among}"] = [result[direction][f"R@{k}"] for k in KS]
    if classes := result["zero_shot"]:
        rows[f"{len(classes['classes'])} classes"] = [classes["top1"], classes["top5"]]
        rows["mean per class"] = [classes["mean_per_class"]]
    return rows


def percent(share: float) -> str:
    """Writes a share in per cent, as "12.3%"; a small share with one significant digit, as
    "0.002%".
    """
    return (
        f"{share:.1%}"
        if share >= 5e-4 or not share
        else f"{float(f'{100 * share:.1g}'):.7f}".rstrip("0") + "%"
    )


def in_words(figures: Mapping[str, Figure], among: int) -> str:
    """Returns the figures and their chance as one line of text for a picture."""
    values = ", ".join(f"{name} {percent(figure['value'])}" for name, figure in figures.items())
    chance = ", ".join(percent(figure["chance"]).rstrip("%") for figure in figures.values())
    return f"{values} of {among} (chance {chance}%)"
