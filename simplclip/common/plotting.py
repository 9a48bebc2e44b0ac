"""This library's pictures: sheets of tiles and texts, and curves; narrow, so that they can be read
on a phone too.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

from simplclip.common.files import write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image

INK, MUTED, GRID, FRAME, RIGHT = "#1b1f24", "#57606a", "#e6e8eb", "#d0d7de", "#1a9850"
SCRIPTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "Arial Unicode MS",
    "Microsoft YaHei",
)
COLOURS = ("#0b6bcb", "#d9480f", "#7048e8", "#2b8a3e", "#c2255c")
# inches; 400 pixels of a phone have 65 an inch, where text of 10 points is 9 high
WIDTH = 6.2
MARGIN = 0.15
DPI = 120
LINE = 1.35 / 72  # inches of a line of text for each point of its size


class Font(NamedTuple):
    """How a text is drawn: its size in points, and matplotlib's weight and colour."""

    size: float = 10
    weight: str = "normal"
    color: str = INK


PLAIN = Font()


class Sheet:
    """A picture WIDTH inches wide, drawn from above.

    Lengths are in inches, y from the top; `y` is where the drawing ends.
    """

    def __init__(self) -> None:
        self.figure = Figure(figsize=(WIDTH, 1), dpi=DPI, facecolor="white")
        self.axis = self.figure.add_axes((0, 0, 1, 1), autoscale_on=False, xlim=(0, WIDTH))
        self.axis.axis("off")
        self.y = MARGIN
        self._renderer = FigureCanvasAgg(self.figure).get_renderer()

    def draw_text(
        self,
        x: float,
        y: float,
        text: str,
        width: float,
        font: Font = PLAIN,
        lines: int = 1,
        align: str = "left",
    ) -> float:
        """Draws text in at most `lines` lines of `width` inches below y; returns its height.

        x: left, center or right, as `align` says. `self.y` stays.
        """
        # bytes of a file's name that are no UTF-8 have lone surrogates, which matplotlib refuses
        text = re.sub("[\ud800-\udfff]", "\ufffd", text)
        properties = FontProperties(family=_fonts(), size=font.size, weight=font.weight)
        length = functools.partial(
            self._renderer.get_text_width_height_descent, prop=properties, ismath=False
        )
        with _any_letters():
            rows = wrapped(text, lambda part: length(part)[0] <= width * DPI, lines)
        for row in rows:
            y += LINE * font.size
            self.axis.text(
                x,
                y - 0.25 * LINE * font.size,
                row,
                fontproperties=properties,
                color=font.color,
                ha=align,
                parse_math=False,  # two $ are no formula
            )
        return LINE * font.size * len(rows)

    def draw_line(self, text: str, font: Font = PLAIN, lines: int = 1) -> None:
        """Draws text below everything else, as wide as the sheet, and moves `y` below it."""
        self.y += self.draw_text(MARGIN, self.y, text, WIDTH - 2 * MARGIN, font, lines)

    def draw_tile(self, image: Image, x: float, y: float, side: float, right: bool = False) -> None:
        """Draws a PIL image, whole and centred, in a square frame, green if it is `right`."""
        width, height = (side * length / max(image.size) for length in image.size)
        left, top = x + (side - width) / 2, y + (side - height) / 2
        self.axis.imshow(
            image,
            extent=(left, left + width, top + height, top),
            interpolation="bilinear",
            aspect="auto",
        )
        if right:
            self.draw_box(x, y, (side, side), RIGHT, 3)
        else:
            self.draw_box(x, y, (side, side), FRAME, 0.8)

    def draw_box(
        self, x: float, y: float, size: tuple[float, float], colour: str = RIGHT, line: float = 1.5
    ) -> None:
        """Draws a frame whose left upper corner is x, y; line: its width in points."""
        box = Rectangle((x, y), *size, fill=False, edgecolor=colour, linewidth=line)
        self.axis.add_patch(box)

    def fit(self) -> None:
        """Makes the picture as high as what is drawn, up to `y` and a margin."""
        self.figure.set_size_inches(WIDTH, self.y + MARGIN)
        self.axis.set_ylim(self.y + MARGIN, 0)

    def write(self, path: str | Path) -> Path:
        """Fits the height and writes the picture as PNG, replacing `path`; returns the path."""
        self.fit()
        return write(self.figure, Path(path))


def wrapped(text: str, fits: Callable[[str], bool], lines: int) -> list[str]:
    """Returns text wrapped into at most `lines` lines; if more are needed, the last ends with "…".

    Words that do not fit are divided; white space becomes single spaces.
    """
    parts: list[str] = []
    for word in re.findall(r"[^\s/]+[\s/]*|[\s/]+", " ".join(text.split())):
        if fits(word.rstrip()):
            parts.append(word)
        else:
            parts += word  # its letters
    rows = [""]
    for part in parts:
        if rows[-1] and not fits((rows[-1] + part).rstrip()):
            rows.append("")
            if len(rows) > lines:
                break
        rows[-1] += part
    if len(rows) > lines:
        last = rows[lines - 1].rstrip()
        while last and not fits(last + " …"):
            last = last[:-1]
        rows = [*rows[: lines - 1], last.rstrip() + " …"]
    return [row.rstrip() for row in rows]


@dataclass
class Panel:
    """Lines over the steps of a run, or other numbers: label -> steps and values. chance: a dotted
    line of the colour of each label. told: the place of the value that stands beside the label.
    """

    title: str
    lines: dict[str, tuple[np.ndarray, np.ndarray]]
    chance: dict[str, float] = field(default_factory=dict)
    percent: bool = False
    from_zero: bool = True  # else the axis is logarithmic, if the values differ much
    solid: int = len(COLOURS)  # lines until the colours come again, for dashed ones
    told: int = -1


def write_panels(
    path: Path,
    panels: Sequence[Panel],
    best: float | None = None,
    words: tuple[str, str] = ("step", "the best evaluation"),
) -> Path:
    """Draws panels below each other, with one axis of steps, into a PNG file; returns its path.

    best: a step at which a dashed line is drawn. words: what a step is, and the best one.
    """
    # inches, and columns of labels
    left = 0.62
    right = 0.3
    plot = 1.45
    gap = 0.22
    columns = 3
    last = max(steps[-1] for panel in panels for steps, _ in panel.lines.values())
    heads = []
    for panel in panels:
        head = 0.28
        if len(panel.lines) > 1:  # rows of labels
            head += LINE * 10 * math.ceil(len(panel.lines) / columns)
        heads.append(head)
    y = height = sum(heads) + len(panels) * (plot + gap) + 0.38
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    for panel, head in zip(panels, heads):
        y -= head + plot
        axis = figure.add_axes(
            (left / WIDTH, y / height, 1 - (left + right) / WIDTH, plot / height), xlim=(0, last)
        )
        handles = _draw_panel(axis, panel, best)
        title = panel.title
        if len(handles) == 1:
            title += ":" + str(handles[0].get_label()).rpartition(":")[2]
        figure.text(
            MARGIN / WIDTH,
            (y + plot + head - 0.06) / height,
            title,
            fontsize=11,
            color=INK,
            va="top",
            parse_math=False,
        )
        if len(handles) > 1:
            by_rows: list[Line2D] = []
            for column in range(columns):
                by_rows += handles[column::columns]
            legend = axis.legend(
                handles=by_rows,
                loc="lower left",
                bbox_to_anchor=(-0.02, 0.98),
                ncols=columns,
                frameon=False,
                fontsize=9.5,
                handlelength=1.2,
                columnspacing=1,
            )
            for text in legend.get_texts():
                text.set_parse_math(False)  # names of splits may have two $
        axis.tick_params(labelbottom=panel is panels[-1])
        y -= gap
    label, about_best = words
    if best is not None:
        label += f"; dashed: {best}, {about_best}"
    axis.set_xlabel(label, color=MUTED, fontsize=10)
    return write(figure, path)


def _draw_panel(axis: Axes, panel: Panel, best: float | None) -> list[Line2D]:
    """Draws a panel's lines, a dashed one at the step `best`; returns the line artists."""
    handles: list[Line2D] = []
    for number, (label, (steps, values)) in enumerate(panel.lines.items()):
        colour = COLOURS[number % panel.solid]
        dashes = "-" if number < panel.solid else "--"
        marker = "." if len(values) < 20 else ""
        value = values[panel.told]
        legend = f"{label}: {value:.1%}" if panel.percent else f"{label}: {value:.3g}"
        handles += axis.plot(steps, values, dashes, color=colour, marker=marker, label=legend)
        if label in panel.chance:
            axis.axhline(panel.chance[label], color=colour, linestyle=":", linewidth=1.2)
    if best is not None:
        axis.axvline(best, color=MUTED, linestyle="--", linewidth=1)
    finite = np.concatenate([values[np.isfinite(values)] for _, values in panel.lines.values()])
    if panel.from_zero:
        axis.set_ylim(bottom=min(0, *finite))
    elif len(finite) and finite.max() > 3 * finite.min() > 0:
        axis.set_yscale("log")
        is_narrow = finite.max() < 100 * finite.min()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if is_narrow else (1,)))
        axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0) if panel.percent else "{x:g}")
    whole = all(steps.dtype.kind == "i" for steps, _ in panel.lines.values())
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=whole))
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=MUTED, length=0, labelsize=9.5)
    axis.spines[:].set_visible(False)
    return handles


@functools.cache
def _fonts() -> list[str]:
    """Returns the names of the fonts for texts: matplotlib's own, those of SCRIPTS found here."""
    return ["DejaVu Sans", *(name for name in SCRIPTS if name in font_manager.get_font_names())]


@contextlib.contextmanager
def _any_letters() -> Iterator[None]:
    """Context without warnings of letters that no font here has, which are drawn as boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield


def png(figure: Figure) -> bytes:
    """Returns the bytes of a PNG file."""
    image = io.BytesIO()
    with _any_letters():
        figure.savefig(image, format="png")
    return image.getvalue()


def write(figure: Figure, path: Path) -> Path:
    """Writes the figure as PNG, replacing `path`; returns the path."""
    write_atomically(path, png(figure))
    return path
