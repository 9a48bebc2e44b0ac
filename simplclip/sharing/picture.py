"""A heat map of how alike the blocks of towers are."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from simplclip.common.plotting import INK, MUTED, new_figure, write
from simplclip.sharing.likeness import Likeness

_PANELS = (
    ("attention", "divergence of attention maps (nats)", "viridis_r"),
    ("updates", "cosine of updates", "viridis"),
    ("outputs", "cosine of outputs", "viridis"),
)
_WRITTEN = 14  # blocks up to which each cell has its number


def heat_map(path: Path, found: list[Likeness], title: str) -> Path:
    """A PNG with a row for each tower: all pairs of its blocks by each measure. Alike is bright in each panel."""
    figure = new_figure(15.0, 4.9 * len(found) + 0.4)
    axes = figure.subplots(len(found), len(_PANELS), squeeze=False)
    for row, likeness in zip(axes, found):
        for axis, (name, label, colours) in zip(row, _PANELS):
            values = getattr(likeness, name).numpy()
            # Maps of trained blocks diverge far less than the ln 2 that is possible.
            low, high = (0.0, max(0.02, np.nanmax(values))) if name == "attention" else (-1.0, 1.0)
            image = axis.imshow(values, cmap=colours, vmin=low, vmax=high)
            axis.set_title(f"{likeness.tower}: {label}", loc="left", color=INK, fontsize=10)
            axis.tick_params(colors=MUTED, length=0, labelsize=8)
            axis.set_xticks(range(len(values)))
            axis.set_yticks(range(len(values)))
            for side in axis.spines.values():
                side.set_visible(False)
            if len(values) <= _WRITTEN:
                for i, line in enumerate(values):
                    for j, value in enumerate(line):
                        dark = image.cmap(image.norm(value))[:3] if value == value else (1, 1, 1)
                        colour = "white" if sum(dark) < 1.6 else INK
                        size = 8 if len(values) < 9 else 6
                        axis.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=size)
            bar = figure.colorbar(image, ax=axis, fraction=0.046, pad=0.03)
            bar.outline.set_visible(False)
            bar.ax.tick_params(colors=MUTED, length=0, labelsize=8)
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=12)
    figure.tight_layout()
    return write(figure, path)
