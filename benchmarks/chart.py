"""Charts of the README and the docs: time and memory of losses against the number of pairs, as SVGs.

A chart is written as text, without a plotting library: the same result file gives the same bytes on every machine, so that a
test can compare them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 880, 392
LEFT, TOP, PANEL_WIDTH, PANEL_HEIGHT = 62, 92, 268, 206
PANEL_STEP = 450  # from the left edge of one panel to that of the next
STYLE = """
text { font: 12px system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif; fill: #1f2328 }
.title { font-size: 14px; font-weight: 600 }
.small { font-size: 11px; fill: #59636e }
.grid { stroke: #e4e7eb; stroke-width: 1 }
polyline { fill: none; stroke-width: 2.2 }
.ours { stroke: #0969da; fill: #0969da }
.theirs { stroke: #bc4c00; fill: #bc4c00 }
.compiled { stroke: #1a7f37; fill: #1a7f37 }
polyline.ours, polyline.theirs, polyline.compiled { fill: none }
.other { stroke-dasharray: 6 4 }
circle { stroke: none }
text.ours, text.theirs, text.compiled { stroke: none }
"""


@dataclass(frozen=True)
class Series:
    objective: str  # as in the result file
    form: str
    title: str
    style: str  # classes of STYLE
    label: str = "right"  # place of the last point's label: "right", "above" where another line passes, or "" for no label


@dataclass(frozen=True)
class Panel:
    title: str
    column: str  # of the result file
    divisor: float  # from its unit to that of the labels
    ticks: tuple[float, ...]  # in the unit of the labels; the first and the last are the ends of the axis
    unit: str

    def label(self, value: float) -> str:
        return f"{value:,.1f} {self.unit}" if value < 10 else f"{value:,.0f} {self.unit}"


@dataclass(frozen=True)
class Chart:
    op: str  # of the result file
    title: str
    series: tuple[Series, ...]
    panels: tuple[Panel, Panel]


TIME, MEMORY = "Forward and backward", "Memory beside the features"
SIMILARITY = Chart(
    "similarity_loss",
    "Time and memory of the similarity losses against the number of pairs",
    (
        Series("contrastive", "simplclip", "simplclip, contrastive loss", "ours"),
        Series("contrastive", "open_clip.ClipLoss", "open_clip.ClipLoss", "theirs"),
        Series("contrastive", "torch.compile, one product", "one product, by torch.compile", "compiled"),
        Series("all four", "simplclip", "simplclip, all four terms", "ours other"),
        Series("all four", "open_clip's losses and KL", "all four by open_clip and torch", "theirs other", "above"),
        Series("all four", "torch.compile, fewest products", "fewest products, by torch.compile", "compiled other", ""),
    ),
    (
        Panel(TIME, "p50_ms", 1000, (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100), "s"),
        Panel(MEMORY, "extra_mib", 1, (40, 100, 200, 500, 1000, 2000, 5000), "MiB"),
    ),
)
SIGMOID = Chart(
    "sigmoid_loss",
    "Time and memory of the sigmoid and the contrastive loss against the number of pairs",
    (
        Series("sigmoid", "simplclip", "simplclip, sigmoid loss", "ours"),
        Series("contrastive", "simplclip", "simplclip, contrastive loss", "ours other"),
        Series("sigmoid", "open_clip.SigLipLoss", "open_clip.SigLipLoss", "theirs", "above"),
        Series("contrastive", "open_clip.ClipLoss", "open_clip.ClipLoss", "theirs other", "above"),
        Series("sigmoid", "torch.compile of open_clip.SigLipLoss", "SigLipLoss by torch.compile", "compiled", ""),
        Series("contrastive", "torch.compile of open_clip.ClipLoss", "ClipLoss by torch.compile", "compiled other", ""),
    ),
    (
        Panel(TIME, "p50_ms", 1000, (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100), "s"),
        Panel(MEMORY, "extra_mib", 1, (5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000), "MiB"),
    ),
)


def draw(chart: Chart, rows: list[dict[str, str]], source: str) -> str:
    """Returns the SVG of the float32 rows of a result file, whose name is `source`."""
    rows = [row for row in rows if row["dtype"] == "float32"]
    sizes = sorted({int(row["n"]) for row in rows})
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}">',
        f"<title>{chart.title}</title>",
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#ffffff"/>',
    ]
    for index, series in enumerate(chart.series):
        x, y = 24 + 300 * (index // 2), 24 + 20 * (index % 2)
        lines.append(f'<polyline class="{series.style}" points="{x},{y - 4} {x + 30},{y - 4}"/>')
        lines.append(_text(x + 38, y, series.title))
    for index, panel in enumerate(chart.panels):
        lines += _panel(chart, panel, LEFT + PANEL_STEP * index, rows, sizes)
    first = rows[0]
    lines.append(_text(24, HEIGHT - 30, f"float32, D = {first['d']}; {first['hardware']}; {first['date']}", style="small"))
    lines.append(_text(24, HEIGHT - 13, f"drawn by make tables from {source}", style="small"))
    return "\n".join([*lines, "</svg>", ""])


def _panel(chart: Chart, panel: Panel, left: float, rows: list[dict[str, str]], sizes: list[int]) -> list[str]:
    """Returns the lines of a panel, whose axes are both logarithmic."""
    low, high = math.log(panel.ticks[0]), math.log(panel.ticks[-1])
    first, last = math.log(sizes[0]), math.log(sizes[-1])

    def across(n: int) -> float:
        return left + 12 + (PANEL_WIDTH - 24) * (math.log(n) - first) / (last - first)

    def down(value: float) -> float:
        return TOP + PANEL_HEIGHT * (high - math.log(value)) / (high - low)

    lines = [_text(left, TOP - 14, f"{panel.title}, {panel.unit}", style="title")]
    for tick in panel.ticks:
        y = down(tick)
        lines.append(f'<line class="grid" x1="{left}" x2="{left + PANEL_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(_text(left - 8, y + 4, f"{tick:,g}", style="small", anchor="end"))
    for n in sizes:
        lines.append(_text(across(n), TOP + PANEL_HEIGHT + 18, f"{n:,}", style="small", anchor="middle"))
    middle, below = left + PANEL_WIDTH / 2, TOP + PANEL_HEIGHT + 36
    lines.append(_text(middle, below, "pairs in the batch, N", style="small", anchor="middle"))
    ends = []
    for series in chart.series:
        mine = [row for row in rows if (row["objective"], row["form"]) == (series.objective, series.form) and row["p50_ms"]]
        values = sorted((int(row["n"]), float(row[panel.column]) / panel.divisor) for row in mine)
        points = [(across(n), down(value)) for n, value in values]
        lines.append(f'<polyline class="{series.style}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
        colour = series.style.split()[0]
        lines += [f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points]
        ends.append((series, *points[-1], panel.label(values[-1][1])))
    return lines + _labels(ends)


def _labels(ends: list[tuple[Series, float, float, str]]) -> list[str]:
    """Returns the labels of the last points, from the lowest up. A label that would cover another in its column moves up."""
    lines, below = [], {}
    for series, x, y, text in sorted(ends, key=lambda end: -end[2]):
        if not series.label:
            continue
        above = series.label == "above"
        y = min(end[2] for end in ends if end[1] == x) - 9 if above else y + 4
        y = below[x, above] = min(y, below.get((x, above), math.inf) - 13)
        place = {"x": x, "anchor": "middle"} if above else {"x": x + 8}
        lines.append(_text(y=y, text=text, style=series.style.split()[0], **place))
    return lines


def _text(x: float, y: float, text: str, *, style: str = "", anchor: str = "start") -> str:
    name = f' class="{style}"' if style else ""
    return f'<text{name} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
