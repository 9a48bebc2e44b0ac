"""The chart of docs/fine-tuning.md, as an SVG: what forms of fine-tuning learn against what they
forget, a point a form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.chart import text

SIDE = 380
LEFT, TOP = 64, 40
TICK = 5
COLORS = ("#59636e", "#0969da", "#8250df", "#bc4c00", "#9a6700", "#1a7f37")
GRID = "#e4e7eb"
STYLE = """
text { font: 12px system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif; fill: #1f2328 }
.small { font-size: 11px; fill: #59636e }
line { stroke-width: 1.2 }
polyline { fill: none; stroke: #1a7f37; stroke-width: 1.4; stroke-dasharray: 4 3 }
"""


def draw(rows: Sequence[dict[str, str]], source: str) -> str:
    """Returns the SVG. rows: those of the part test of the result file `source`."""
    curve = [row for row in rows if row["form"].startswith("blends of")]
    forms = [row for row in rows if row not in curve]
    low, high = {}, {}
    for name in ("old", "new"):
        low[name] = TICK * math.floor(min(float(row[f"{name} low"]) for row in forms) / TICK)
        high[name] = TICK * math.ceil(max(float(row[f"{name} high"]) for row in forms) / TICK)

    def x(value: str | float) -> float:
        return LEFT + SIDE * (float(value) - low["old"]) / (high["old"] - low["old"])

    def y(value: str | float) -> float:
        return TOP + SIDE * (high["new"] - float(value)) / (high["new"] - low["new"])

    width, height = LEFT + SIDE + 230, TOP + SIDE + 74
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 '
        f'{width} {height}">',
        "<title>R@1 of the new domain against R@1 of the old one</title>",
        f"<style>{STYLE}</style>",
        f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>',
    ]
    for tick in range(low["old"], high["old"] + 1, TICK):
        lines.append(_line(GRID, x(tick), y(low["new"]), x(tick), y(high["new"])))
        lines.append(text(x(tick), TOP + SIDE + 18, f"{tick} %", anchor="middle"))
    for tick in range(low["new"], high["new"] + 1, TICK):
        lines.append(_line(GRID, x(low["old"]), y(tick), x(high["old"]), y(tick)))
        lines.append(text(LEFT - 8, y(tick) + 4, f"{tick} %", anchor="end"))
    corners = " ".join(f"{x(row['old']):.1f},{y(row['new']):.1f}" for row in curve)
    lines.append(f'<polyline points="{corners}"/>')
    for number, (color, row) in enumerate(zip(COLORS, forms)):
        old, new = x(row["old"]), y(row["new"])
        lines += [
            _line(color, x(row["old low"]), new, x(row["old high"]), new),
            _line(color, old, y(row["new low"]), old, y(row["new high"])),
            f'<circle cx="{old:.1f}" cy="{new:.1f}" r="4.5" fill="{color}"/>',
        ]
        top = TOP + 12 + 22 * number
        lines.append(f'<circle cx="{LEFT + SIDE + 28}" cy="{top - 4}" r="4.5" fill="{color}"/>')
        lines.append(text(LEFT + SIDE + 40, top, row["form"]))
    top = TOP + 12 + 22 * len(forms)
    lines += [
        text(LEFT + SIDE + 22, top, "dashed: blends of full with the start", style="small"),
        text(LEFT + SIDE + 22, top + 17, "bars: 95 % intervals over the seeds", style="small"),
        text(LEFT, TOP - 14, "R@1 of the new domain"),
        text(LEFT + SIDE, TOP + SIDE + 38, "R@1 of the old domain", anchor="end"),
        text(LEFT, height - 12, f"drawn by make tables from {source}", style="small"),
    ]
    return "\n".join([*lines, "</svg>", ""])


def _line(color: str, x1: float, y1: float, x2: float, y2: float) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line stroke="{color}" {ends}/>'
