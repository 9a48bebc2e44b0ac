"""Colours, axes and file output of this library's pictures."""

from __future__ import annotations

import functools
import io
import textwrap
import warnings
from pathlib import Path
from typing import Any

from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from simplclip.common.files import write_atomically

INK, MUTED, GRID, FRAME = "#1b1f24", "#6e7781", "#e6e8eb", "#d0d7de"
SCRIPTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "PingFang SC", "Arial Unicode MS", "Microsoft YaHei")
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


def sheet(width: float, height: float, head: float) -> tuple[Figure, Any]:
    """A figure with an axis in inches for tiles and text, from y = -head, above the tiles, down to y = height."""
    figure = new_figure(width, height + head + 0.05)
    axis = figure.add_axes((0.02, 0.02, 0.96, 0.96))
    axis.set_xlim(0, width)
    axis.set_ylim(height, -head)
    axis.set_aspect("equal", adjustable="box")
    axis.axis("off")
    return figure, axis


def draw_image(axis: Any, image: Any, x: float, y: float) -> None:
    """Draws an image into a tile of an inch."""
    axis.imshow(image, extent=(x, x + 1, y + 1, y), interpolation="bilinear", zorder=1)


def frame(
    axis: Any, x: float, y: float, width: float = 1.0, height: float = 1.0, colour: str = FRAME, line: float = 0.8
) -> None:
    axis.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=colour, linewidth=line, zorder=2))


def draw_text(axis: Any, x: float, y: float, text: str, size: float, colour: str = INK, **style: Any) -> None:
    options = {"va": "center", "parse_math": False, **style}  # a caption with two $ is no formula
    axis.text(x, y, text, fontsize=size, color=colour, family=_fonts(), **options)


@functools.cache
def _fonts() -> list[str]:
    """Returns the names of matplotlib's own font and of those fonts in SCRIPTS that this machine has."""
    return ["DejaVu Sans", *(name for name in SCRIPTS if name in font_manager.get_font_names())]


def wrapped(text: str, width: int, lines: int) -> str:
    """Wraps text into at most `lines` lines of `width` characters."""
    return textwrap.fill(text, width, max_lines=lines, placeholder=" …")


def write(figure: Figure, path: Path) -> Path:
    image = io.BytesIO()
    with warnings.catch_warnings():  # letters that no font here has become boxes
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(image, format="png")
    write_atomically(path, image.getvalue())
    return path
