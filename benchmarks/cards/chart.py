"""The chart of docs/plan.md, as an SVG: predicted against measured step times, a point a step."""

from __future__ import annotations

import math
from collections.abc import Sequence

SIDE = 420
LEFT = 64
TOP = 40
COLORS = {"rtx-3090": "#0969da", "rtx-4090": "#bc4c00", "rtx-5090": "#1a7f37"}
STYLE = """
text { font: 12px system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif; fill: #1f2328 }
.small { font-size: 11px; fill: #59636e }
.grid { stroke: #e4e7eb; stroke-width: 1 } .equal { stroke: #1f2328; stroke-width: 1 }
.off { stroke: #8c959f; stroke-width: 1; stroke-dasharray: 4 3 }
circle { fill-opacity: 0.55 }
"""


def draw(rows: Sequence[dict], source: str) -> str:
    """Returns the SVG. rows: of `compare`, or those of the result file `source`."""
    values = [float(row[name]) for row in rows for name in ("ms", "likely_ms")]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))

    def position(ms: float) -> float:
        return SIDE * (math.log10(ms) - low) / (high - low)

    def line(style: str, x1: float, y1: float, x2: float, y2: float) -> str:
        ends = (LEFT + x1, TOP + SIDE - y1, LEFT + x2, TOP + SIDE - y2)
        corners = 'x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"'.format(*ends)
        return f'<line class="{style}" {corners}/>'

    width, height = LEFT + SIDE + 180, TOP + SIDE + 70
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 '
        f'{width} {height}">',
        "<title>Predicted against measured milliseconds of a step</title>",
        f"<style>{STYLE}</style>",
        f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>',
    ]
    for power in range(low, high + 1):
        tick, label = position(10**power), f"{10**power:,g}"
        lines += [line("grid", tick, 0, tick, SIDE), line("grid", 0, tick, SIDE, tick)]
        lines.append(
            f'<text x="{LEFT + tick:.1f}" y="{TOP + SIDE + 18}" text-anchor="middle">{label}</text>'
        )
        lines.append(
            f'<text x="{LEFT - 8}" y="{TOP + SIDE - tick + 4:.1f}" text-anchor="end">{label}</text>'
        )
    off = position(1.35 * 10**low)
    lines += [
        line("equal", 0, 0, SIDE, SIDE),
        line("off", 0, off, SIDE - off, SIDE),
        line("off", off, 0, SIDE, SIDE - off),
    ]
    for number, (card, color) in enumerate(COLORS.items()):
        points = [row for row in rows if row["card"] == card]
        for row in points:
            x = LEFT + position(float(row["ms"]))
            y = TOP + SIDE - position(float(row["likely_ms"]))
            lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{color}"/>')
        y = TOP + 12 + 22 * number
        lines.append(f'<circle cx="{LEFT + SIDE + 24}" cy="{y - 4}" r="4" fill="{color}"/>')
        lines.append(f'<text x="{LEFT + SIDE + 36}" y="{y}">{card}: {len(points)} steps</text>')
    lines.append(
        f'<text x="{LEFT + SIDE + 16}" y="{TOP + 86}" class="small">dashed: 35 % apart</text>'
    )
    lines.append(f'<text x="{LEFT}" y="{TOP - 14}">predicted, ms a step</text>')
    lines.append(
        f'<text x="{LEFT + SIDE}" y="{TOP + SIDE + 38}" text-anchor="end">measured by timm\'s '
        "authors, ms a step</text>"
    )
    lines.append(
        f'<text x="{LEFT}" y="{height - 10}" class="small">drawn by python -m benchmarks.cards '
        f"from {source}</text>"
    )
    return "\n".join([*lines, "</svg>", ""])
