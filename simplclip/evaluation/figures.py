"""The figures of an evaluation.json as a table, each with its chance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from simplclip.retrieval.metrics import KS

Figure = Mapping[str, float]


def table(results: Mapping[str, Any]) -> Table:
    """Returns `evaluate`'s figures in per cent, for 80 columns. Figures of several models stand above their common chance."""
    models = [results, *results.get("baselines", {}).values()]
    step = "" if results["step"] is None else f", step {results['step']}"
    shown = Table(
        title=f"{len(models)} models" if models[1:] else f"{results['model']}{step}",
        caption="share found among the first k",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    shown.add_column("split", overflow="fold", max_width=14)
    shown.add_column("among", no_wrap=True)
    if models[1:]:
        shown.add_column("model", overflow="fold")
    for k in KS:
        shown.add_column(f"@{k}", justify="right", no_wrap=True)

    def add(first: str, among: str, model: str, cells: list[str], style: str = "") -> None:
        blank = [""] * (len(KS) - len(cells))
        shown.add_row(first, among, *([model] if models[1:] else []), *cells, *blank, style=style)

    for split in dict.fromkeys(name for model in models for name in model["splits"]):
        rows: dict[str, list[tuple[str, list[Figure]]]] = {}
        for model in models:
            if split in model["splits"]:
                for among, figures in _rows(model["splits"][split]).items():
                    rows.setdefault(among, []).append((escape(str(model["checkpoint"])), figures))
        title = escape(split)
        for among, several in rows.items():
            for number, (name, figures) in enumerate(several):
                add("" if number else title, "" if number else among, name, [percent(figure["value"]) for figure in figures])
            add("", "  chance", "", [percent(figure["chance"]) for figure in several[0][1]], "dim")
            title = ""
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
    """Writes a share in per cent, as "12.3%"; a small share with one significant digit, as "0.002%"."""
    return f"{share:.1%}" if share >= 5e-4 or not share else f"{float(f'{100 * share:.1g}'):.7f}".rstrip("0") + "%"


def in_words(figures: Mapping[str, Mapping[str, float]], among: int) -> str:
    """Returns the figures and their chance as one line of text for a picture."""
    found = "   ".join(f"{name} {percent(figure['value'])}" for name, figure in figures.items())
    chance = ", ".join(percent(figure["chance"]).rstrip("%") for figure in figures.values())
    return f"{found}   of {among} (chance {chance}%)"
