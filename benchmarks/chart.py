"""Charts of the contrastive loss: time and memory against the number of pairs, and against each
other.

The SVG is written as text, without a plotting library: the same result file gives the same bytes on
every machine, so that a test can compare them.
"""

from __future__ import annotations

import math
from html import escape

WIDTH, HEIGHT = 880, 372
LEFT = 62
TOP = 72
PANEL_WIDTH = 268
PANEL_HEIGHT = 206
PANEL_STEP = 450  # from the left edge of one panel to that of the next
STYLE = """
text { font: 12px system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif; fill: #1f2328 }
.title { font-size: 14px; font-weight: 600 }
.small { font-size: 11px; fill: #59636e }
.grid { stroke: #e4e7eb; stroke-width: 1 }
polyline { fill: none; stroke-width: 2.2 }
polyline.ours { stroke: #0969da } .ours { fill: #0969da }
polyline.eager { stroke: #bc4c00 } .eager { fill: #bc4c00 }
polyline.compiled { stroke: #1a7f37 } .compiled { fill: #1a7f37 }
polyline.chunked { stroke: #8250df } .chunked { fill: #8250df }
polyline.ours, polyline.eager, polyline.compiled, polyline.chunked { fill: none }
"""
# Forms of the result file: class of STYLE, and title.
SERIES = {
    "simplclip": ("ours", "simplclip"),
    "open_clip.ClipLoss": ("eager", "open_clip.ClipLoss, eager"),
    "torch.compile, one product": ("compiled", "the N×N loss in plain torch, compiled"),
    "torch's linear_cross_entropy in chunks": ("chunked", "torch's linear_cross_entropy in chunks"),
}
# Points of the chart of time against memory: form, and its label.
TRADES = {
    "ours": {
        "simplclip, no rows kept": "store_bytes=0",
        "simplclip": "default",
        "simplclip, all rows kept": "all rows kept",
    },
    "chunked": {
        "torch's linear_cross_entropy in chunks, a quarter of the rows": "aspect_ratio:4",
        "torch's linear_cross_entropy in chunks": "default",
    },
    "eager": {"open_clip.ClipLoss": "open_clip.ClipLoss"},
    "compiled": {"torch.compile, one product": "the N×N loss, compiled"},
}
TRADE_SIZE = 8192
# Title, column of the result file, what to divide it by, and unit.
PANELS = (
    ("Forward and backward", "p50_ms", 1000, "s"),
    ("Memory beside the features", "extra_mib", 1, "MiB"),
)


def draw(rows: list[dict[str, str]], source: str) -> str:
    """Returns the SVG of the contrastive loss in float32. rows: those of the result file
    `source`.
    """
    shown = ("contrastive", "float32")
    rows = [row for row in rows if (row["objective"], row["dtype"]) == shown and row["p50_ms"]]
    lines = _head("Time and memory of the contrastive loss against the number of pairs")
    for x, (style, title) in zip((24, 138, 338, 610), SERIES.values()):
        lines.append(f'<polyline class="{style}" points="{x},20 {x + 30},20"/>')
        lines.append(text(x + 38, 24, title))
    for index, panel in enumerate(PANELS):
        lines += _panel(*panel, LEFT + PANEL_STEP * index, rows)
    return "\n".join([*lines, *_foot(rows[0], source)])


def draw_trade(rows: list[dict[str, str]], source: str) -> str:
    """Returns the SVG of time against memory of TRADE_SIZE pairs in float32. rows: as of `draw`."""
    shown = ("contrastive", "float32", str(TRADE_SIZE))
    at = {
        row["form"]: (float(row["extra_mib"]), float(row["p50_ms"]) / 1000)
        for row in rows
        if (row["objective"], row["dtype"], row["n"]) == shown and row["p50_ms"]
    }
    named = [form for forms in TRADES.values() for form in forms]
    across = _Axis([at[form][0] for form in named], LEFT, WIDTH - LEFT - 200)
    down = _Axis([at[form][1] for form in named], TOP + PANEL_HEIGHT, -PANEL_HEIGHT)
    lines = _head("Time of the contrastive loss against its memory")
    title = f"Forward and backward of {TRADE_SIZE:,} pairs, s, against MiB beside the features"
    lines.append(text(24, TOP - 40, title, style="title"))
    right, bottom = LEFT + across.length, TOP + PANEL_HEIGHT
    for tick in down.ticks:
        y = down.place(tick)
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(text(LEFT - 8, y + 4, f"{tick:,g}", style="small", anchor="end"))
    for tick in across.ticks:
        x = across.place(tick)
        lines.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        lines.append(text(x, bottom + 18, f"{tick:,g}", style="small", anchor="middle"))
    for style, forms in TRADES.items():
        points = [(across.place(at[form][0]), down.place(at[form][1])) for form in forms]
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        lines.append(f'<polyline class="{style}" points="{corners}"/>')
        for index, ((x, y), label) in enumerate(zip(points, forms.values())):
            label_y = y + 16 if index else y - 5  # a label does not cover the one before
            owner = {"ours": "simplclip, ", "chunked": "torch in chunks, "}.get(style, "")
            lines.append(f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>')
            lines.append(text(x + 8, label_y, owner + label, style=style))
    return "\n".join([*lines, *_foot(rows[0], source)])


class _Axis:
    """A logarithmic axis with its ticks, in pixels from `start` on."""

    def __init__(self, values: list[float], start: float, length: float) -> None:
        self.ticks, self.start, self.length = _ticks(values), start, length

    def place(self, value: float) -> float:
        """Returns the pixel of a value."""
        share = math.log(value / self.ticks[0]) / math.log(self.ticks[-1] / self.ticks[0])
        return self.start + self.length * share


def _head(title: str) -> list[str]:
    """Returns the first lines of a chart."""
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
        f"<title>{title}</title>",
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#ffffff"/>',
    ]


def _foot(row: dict[str, str], source: str) -> list[str]:
    """Returns the last lines of a chart."""
    measured = f"float32, D = {row['d']}; {row['hardware']}; {row['date']}"
    return [
        text(24, HEIGHT - 30, measured, style="small"),
        text(24, HEIGHT - 13, f"drawn by make tables from {source}", style="small"),
        "</svg>",
        "",
    ]


def _ticks(values: list[float]) -> list[float]:
    """Returns the numbers 1, 2, 5, 10, ... that enclose the values."""
    numbers = [lead * 10**power for power in range(-3, 6) for lead in (1, 2, 5)]
    first = max(n for n in numbers if n <= min(values))
    last = min(n for n in numbers if n >= max(values))
    return [n for n in numbers if first <= n <= last]


def _panel(
    title: str, column: str, divisor: float, unit: str, left: float, rows: list[dict[str, str]]
) -> list[str]:
    """Returns the lines of a panel, whose axes are both logarithmic."""
    sizes = sorted({int(row["n"]) for row in rows})
    values = {
        (row["form"], int(row["n"])): float(row[column]) / divisor
        for row in rows
        if row["form"] in SERIES
    }
    ticks = _ticks(list(values.values()))

    def across(n: int) -> float:
        width = (PANEL_WIDTH - 24) * math.log(n / sizes[0])
        return left + 12 + width / math.log(sizes[-1] / sizes[0])

    def down(value: float) -> float:
        return TOP + PANEL_HEIGHT * math.log(ticks[-1] / value) / math.log(ticks[-1] / ticks[0])

    lines = [text(left, TOP - 14, f"{title}, {unit}", style="title")]
    for tick in ticks:
        y = down(tick)
        lines.append(
            f'<line class="grid" x1="{left}" x2="{left + PANEL_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        lines.append(text(left - 8, y + 4, f"{tick:,g}", style="small", anchor="end"))
    for n in sizes:
        y = TOP + PANEL_HEIGHT + 18
        lines.append(text(across(n), y, f"{n:,}", style="small", anchor="middle"))
    middle, y = left + PANEL_WIDTH / 2, TOP + PANEL_HEIGHT + 36
    lines.append(text(middle, y, "pairs in the batch, N", style="small", anchor="middle"))
    ends = []
    for form, (style, _) in SERIES.items():
        points = [(across(n), down(values[form, n])) for n in sizes if (form, n) in values]
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        lines.append(f'<polyline class="{style}" points="{corners}"/>')
        lines += [f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points]
        last = values[form, max(n for name, n in values if name == form)]
        label = f"{last:,.1f} {unit}" if last < 10 else f"{last:,.0f} {unit}"
        x, y = points[-1]
        ends.append((y + 4, x + 8, style, label))
    label_y = math.inf
    # from the lowest up; a label that would cover another moves up
    for y, x, style, label in sorted(ends, reverse=True):
        label_y = min(y, label_y - 13)
        lines.append(text(x, label_y, label, style=style))
    return lines


def text(x: float, y: float, words: str, *, style: str = "", anchor: str = "start") -> str:
    """Returns a text of an SVG; style: a class."""
    name = f' class="{style}"' if style else ""
    return f'<text{name} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
