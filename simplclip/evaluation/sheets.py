"""Contact sheets: pictures of queries and their nearest candidates."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
from matplotlib.patches import Rectangle

from simplclip.common.plotting import INK, MUTED, new_figure, write
from simplclip.evaluation.splits import Split

RIGHT, FRAME = "#1a9850", "#d0d7de"


def contact_sheet(
    path: str | Path, split: Split, title: str, subtitles: tuple[str, str] = ("", ""), rows: int = 8, top: int = 5
) -> Path:
    """A picture of `rows` captions with their `top` nearest images, and `rows` images with their nearest captions.

    split: encoded. The queries are drawn at random with a fixed seed. Right answers (same group) are framed green.
    subtitles: a line for each half, e.g. its metrics.
    """
    pick = np.random.default_rng(0)
    top_images, top_texts = min(top, len(split.data)), min(top, len(split.captions))
    texts = np.sort(pick.permutation(len(split.captions))[:rows])
    images = np.sort(pick.permutation(len(split.data))[:rows])
    height = max(len(texts), len(images))
    gap, tile, label, caption = 0.14, 1.0, 2.3, 3.9
    right = label + top * (tile + gap) + 0.6
    width = right + tile + gap + caption + 0.1
    figure = new_figure(width, height * (tile + gap) + 1.3)
    axis = figure.add_axes((0.02, 0.02, 0.96, 0.96))
    axis.set_xlim(0, width)
    axis.set_ylim(height * (tile + gap), -1.25)
    axis.set_aspect("equal", adjustable="box")
    axis.axis("off")
    axis.text(0, -1.1, title, fontsize=15, fontweight="bold", color=INK, va="center")
    axis.add_patch(Rectangle((width - 1.55, -1.19), 0.18, 0.18, fill=False, edgecolor=RIGHT, linewidth=2.5))
    axis.text(width - 1.25, -1.1, "right answer", fontsize=10, color=MUTED, va="center")
    for x, head, line in (
        (0, "Caption → nearest images", subtitles[0]),
        (right, "Image → nearest captions", subtitles[1]),
    ):
        axis.text(x, -0.62, head, fontsize=12, color=INK, va="center")
        axis.text(x, -0.3, line, fontsize=10, color=MUTED, va="center")

    def show(image: int, x: float, y: float, hit: bool = False) -> None:
        axis.imshow(split.data.picture(image), extent=(x, x + tile, y + tile, y), interpolation="bilinear", zorder=1)
        axis.add_patch(
            Rectangle(
                (x, y),
                tile,
                tile,
                fill=False,
                edgecolor=RIGHT if hit else FRAME,
                linewidth=3.5 if hit else 0.8,
                zorder=2,
            )
        )

    for row, query in enumerate(texts):
        y = row * (tile + gap)
        axis.text(
            label - 0.2,
            y + tile / 2,
            _wrapped(split.captions[query], 22, 4),
            fontsize=10.5,
            color=INK,
            ha="right",
            va="center",
        )
        near = (split.image_features @ split.text_features[query]).topk(top_images).indices.tolist()
        for column, image in enumerate(near):
            hit = bool(split.data.groups[image] == split.caption_groups[query])
            show(image, label + column * (tile + gap), y, hit)
    for row, query in enumerate(images):
        y = row * (tile + gap)
        show(query, right, y)
        near = (split.text_features @ split.image_features[query]).topk(top_texts)
        for place, (text, similarity) in enumerate(zip(near.indices.tolist(), near.values.tolist())):
            hit = bool(split.caption_groups[text] == split.data.groups[query])
            line, x = y + (place + 0.5) * tile / top, right + tile + gap
            if hit:
                axis.add_patch(
                    Rectangle(
                        (x, line - 0.43 * tile / top),
                        caption,
                        0.86 * tile / top,
                        fill=False,
                        edgecolor=RIGHT,
                        linewidth=2,
                    )
                )
            axis.text(
                x + 0.1,
                line,
                _wrapped(split.captions[text], 46, 1),
                fontsize=9,
                va="center",
                color=INK if hit else MUTED,
                fontweight="bold" if hit else "normal",
            )
            axis.text(x + caption - 0.1, line, f"{similarity:.2f}", fontsize=8, color=MUTED, ha="right", va="center")
    return write(figure, Path(path))


def _wrapped(text: str, width: int, lines: int) -> str:
    return textwrap.fill(text, width, max_lines=lines, placeholder=" …").replace("$", r"\$")
