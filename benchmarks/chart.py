"""The README's chart of the contrastive loss: time and memory against the number of pairs.

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
polyline.ours, polyline.eager, polyline.compiled { fill: none }
"""
# Forms of the result file: class of STYLE, and title.
SERIES = {
    "simplclip": ("ours", "simplclip"),
    "open_clip.ClipLoss": ("eager", "open_clip.ClipLoss, eager"),
    "torch.compile, one product": ("compiled", "the N×N loss in plain torch, torch.compile"),
}
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
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
        "<title>Time and memory of the contrastive loss against the number of pairs</title>",
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#ffffff"/>',
    ]
    for x, (style, title) in zip((24, 150, 370), SERIES.values()):
        lines.append(f'<polyline class="{style}" points="{x},20 {x + 30},20"/>')
        lines.append(text(x + 38, 24, title))
    for index, panel in enumerate(PANELS):
        lines += _panel(*panel, LEFT + PANEL_STEP * index, rows)
    first = rows[0]
    measured = f"float32, D = {first['d']}; {first['hardware']}; {first['date']}"
    lines.append(text(24, HEIGHT - 30, measured, style="small"))
    lines.append(text(24, HEIGHT - 13, f"drawn by make tables from {source}", style="small"))
    return "\n".join([*lines, "</svg>", ""])


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
