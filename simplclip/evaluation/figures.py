"""The figures of an evaluation.json as a table, each with its chance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from simplclip.retrieval.metrics import KS


def table(results: Mapping[str, Any]) -> Table:
    """The figures of `evaluate` in per cent with their chance, for a terminal of 80 columns; several models together."""
    models = [results, *results.get("baselines", {}).values()]
    step = "" if results["step"] is None else f", step {results['step']}"
    shown = Table(
        title=f"{len(models)} models" if models[1:] else f"{results['model']}{step}",
        caption="share found among the first k (chance)",
    )
    shown.add_column("split", overflow="fold", max_width=14)
    shown.add_column("among", no_wrap=True)
    if models[1:]:
        shown.add_column("model", overflow="fold", max_width=24)
    for k in KS:
        shown.add_column(f"@{k}", justify="right", no_wrap=True)
    for split in dict.fromkeys(name for model in models for name in model["splits"]):
        rows: dict[str, list[tuple[str, list[str]]]] = {}
        for model in models:
            if split in model["splits"]:
                for among, cells in _rows(model["splits"][split]).items():
                    rows.setdefault(among, []).append((str(model["checkpoint"]), cells))
        for among, several in rows.items():
            for number, (model, cells) in enumerate(several):
                first = (escape(split), among) if not number else ("", "")
                shown.add_row(*first, *([escape(model)] if models[1:] else []), *cells, *[""] * (len(KS) - len(cells)))
        shown.add_section()
    return shown


def _rows(result: Mapping[str, Any]) -> dict[str, list[str]]:
    rows = {}
    for direction, among in (("image_to_text", "texts"), ("text_to_image", "images")):
        if direction in result:
            rows[f"{result[among]} {among}"] = [_cell(result[direction][f"R@{k}"]) for k in KS]
    if classes := result["zero_shot"]:
        number = len(classes["classes"])
        rows[f"{number} classes"] = [_cell(classes["top1"]), _cell(classes["top5"])]
        rows[f"{number}, mean per class"] = [_cell(classes["mean_per_class"])]
    return rows


def _cell(figure: Mapping[str, float]) -> str:
    return f"{percent(figure['value'])} [dim]({percent(figure['chance'])})[/dim]"


def percent(share: float) -> str:
    """A share in per cent, as "12.3%"; a small one by its first digit, as "0.002%"."""
    return f"{share:.1%}" if share >= 5e-4 or not share else f"{float(f'{100 * share:.1g}'):.7f}".rstrip("0") + "%"


def in_words(figures: Mapping[str, Mapping[str, float]], among: int) -> str:
    """A line for a picture."""
    found = "   ".join(f"{name} {percent(figure['value'])}" for name, figure in figures.items())
    chance = ", ".join(percent(figure["chance"]).rstrip("%") for figure in figures.values())
    return f"{found}   of {among} (chance {chance}%)"
