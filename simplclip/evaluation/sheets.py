"""Contact sheets: pictures of queries and their nearest candidates."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
from matplotlib.patches import Rectangle

from simplclip.common.plotting import INK, MUTED, new_figure, write
from simplclip.evaluation.metrics import Split

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
    gap, tile, label, caption = 0.14, 1.0, 2.3, 3.9
    row_height, line_height = tile + gap, tile / top
    right = label + top * row_height + 0.6
    width, height = right + tile + gap + caption + 0.1, max(len(texts), len(images)) * row_height
    figure = new_figure(width, height + 1.3)
    axis = figure.add_axes((0.02, 0.02, 0.96, 0.96))
    axis.set_xlim(0, width)
    axis.set_ylim(height, -1.25)
    axis.set_aspect("equal", adjustable="box")
    axis.axis("off")

    def frame(x: float, y: float, width: float, height: float, **style) -> None:
        axis.add_patch(Rectangle((x, y), width, height, fill=False, **style))

    def say(x: float, y: float, text: str, size: float, colour: str = INK, **style) -> None:
        axis.text(x, y, text, fontsize=size, color=colour, va="center", **style)

    def show(image: int, x: float, y: float, hit: bool = False) -> None:
        axis.imshow(split.data.picture(image), extent=(x, x + tile, y + tile, y), interpolation="bilinear", zorder=1)
        frame(x, y, tile, tile, edgecolor=RIGHT if hit else FRAME, linewidth=3.5 if hit else 0.8, zorder=2)

    say(0, -1.1, title, 15, fontweight="bold")
    frame(width - 1.55, -1.19, 0.18, 0.18, edgecolor=RIGHT, linewidth=2.5)
    say(width - 1.25, -1.1, "right answer", 10, MUTED)
    for x, head, line in zip((0, right), ("Caption → nearest images", "Image → nearest captions"), subtitles):
        say(x, -0.62, head, 12)
        say(x, -0.3, line, 10, MUTED)
    for row, query in enumerate(texts):
        y = row * row_height
        say(label - 0.2, y + tile / 2, _wrapped(split.captions[query], 22, 4), 10.5, ha="right")
        near = (split.image_features @ split.text_features[query]).topk(top_images).indices.tolist()
        for column, image in enumerate(near):
            show(image, label + column * row_height, y, bool(split.data.groups[image] == split.caption_groups[query]))
    for row, query in enumerate(images):
        y, x = row * row_height, right + tile + gap
        show(query, right, y)
        near = (split.text_features @ split.image_features[query]).topk(top_texts)
        for place, (text, similarity) in enumerate(zip(near.indices.tolist(), near.values.tolist())):
            line = y + (place + 0.5) * line_height
            hit = bool(split.caption_groups[text] == split.data.groups[query])
            if hit:
                frame(x, line - 0.43 * line_height, caption, 0.86 * line_height, edgecolor=RIGHT, linewidth=2)
            words = _wrapped(split.captions[text], 46, 1)
            say(x + 0.1, line, words, 9, INK if hit else MUTED, fontweight="bold" if hit else "normal")
            say(x + caption - 0.1, line, f"{similarity:.2f}", 8, MUTED, ha="right")
    return write(figure, Path(path))


def _wrapped(text: str, width: int, lines: int) -> str:
    return textwrap.fill(text, width, max_lines=lines, placeholder=" …").replace("$", r"\$")
