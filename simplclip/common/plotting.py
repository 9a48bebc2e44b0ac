"""Colours, axes and file output of this library's pictures."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.figure import Figure

from simplclip.common.files import write_atomically

INK, MUTED, GRID = "#1b1f24", "#6e7781", "#e6e8eb"
COLOURS = ("#0b6bcb", "#d9480f", "#7048e8", "#2b8a3e", "#c2255c")


def new_figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=120, facecolor="white")


def style(axis, title: str) -> None:
    axis.set_title(title, loc="left", color=INK, fontsize=11)
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=MUTED, length=0, labelsize=9)
    for side in axis.spines.values():
        side.set_visible(False)


def write(figure: Figure, path: Path) -> Path:
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomically(path, image.getvalue())
    return path
