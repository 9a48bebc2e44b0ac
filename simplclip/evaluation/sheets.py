"""Contact sheets: pictures of queries and their nearest candidates, and of the classes that are confused most."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.patches import Rectangle
from torch import Tensor

from simplclip.common.plotting import INK, MUTED, new_figure, write
from simplclip.evaluation.metrics import nearest
from simplclip.evaluation.split import Split

RIGHT, WRONG, FRAME = "#1a9850", "#d9480f", "#d0d7de"
PAIRS = 10  # of a confusion sheet


def contact_sheet(
    path: str | Path, split: Split, title: str, subtitles: tuple[str, str] = ("", ""), rows: int = 8, top: int = 5
) -> Path:
    """A picture of `rows` captions with their `top` nearest images, and `rows` images with their nearest captions.

    split: encoded. The queries are drawn at random with a fixed seed. Right answers (same group) are framed green.
    subtitles: a line for each half, e.g. its metrics.
    """
    pick = np.random.default_rng(0)
    texts = np.sort(pick.permutation(len(split.captions))[:rows])
    images = np.sort(pick.permutation(len(split))[:rows])
    near_images, _ = _nearest(split.text_features[texts], split.image_features, top)
    near_texts, similarities = _nearest(split.image_features[images], split.text_features, top)
    shown = split.pictures([*{*images.tolist(), *(image for near in near_images for image in near)}])
    groups, caption_groups = split.groups, split.caption_groups
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
        axis.imshow(shown[image], extent=(x, x + tile, y + tile, y), interpolation="bilinear", zorder=1)
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
        for column, image in enumerate(near_images[row]):
            show(image, label + column * row_height, y, bool(groups[image] == caption_groups[query]))
    for row, query in enumerate(images):
        y, x = row * row_height, right + tile + gap
        show(query, right, y)
        for place, (text, similarity) in enumerate(zip(near_texts[row], similarities[row])):
            line = y + (place + 0.5) * line_height
            hit = bool(caption_groups[text] == groups[query])
            if hit:
                frame(x, line - 0.43 * line_height, caption, 0.86 * line_height, edgecolor=RIGHT, linewidth=2)
            words = _wrapped(split.captions[text], 46, 1)
            say(x + 0.1, line, words, 9, INK if hit else MUTED, fontweight="bold" if hit else "normal")
            say(x + caption - 0.1, line, f"{similarity:.2f}", 8, MUTED, ha="right")
    return write(figure, Path(path))


def confusion_sheet(path: str | Path, split: Split, found: Mapping[str, Any], title: str, subtitle: str = "") -> Path | None:
    """A picture of the classes that are confused most, with images of each pair; None if no image is wrong.

    found: the answer of `zero_shot` for this split.
    """
    pairs = found["confused"][:PAIRS]
    if not pairs:
        return None
    shown = split.pictures([row for pair in pairs for row in pair["rows"]])
    label, gap, columns = 4.6, 0.14, max(len(pair["rows"]) for pair in pairs)
    width, height = max(label + columns * (1 + gap) + 0.1, 8), len(pairs) * (1 + gap)
    figure = new_figure(width, height + 1.0)
    axis = figure.add_axes((0.02, 0.02, 0.96, 0.96))
    axis.set_xlim(0, width)
    axis.set_ylim(height, -0.95)
    axis.set_aspect("equal", adjustable="box")
    axis.axis("off")
    axis.text(0, -0.75, _wrapped(title, 90, 1), fontsize=15, color=INK, va="center", fontweight="bold")
    axis.text(0, -0.35, subtitle, fontsize=10, color=MUTED, va="center")
    for number, pair in enumerate(pairs):
        y = number * (1 + gap)
        axis.text(0, y + 0.28, _wrapped(pair["class"], 40, 1), fontsize=11, color=INK, va="center", fontweight="bold")
        axis.text(0, y + 0.53, _wrapped(f"taken for {pair['taken_for']}", 44, 1), fontsize=11, color=WRONG, va="center")
        share = f"{pair['images']} of {pair['of']} images, {pair['images'] / pair['of']:.0%}"
        axis.text(0, y + 0.78, share, fontsize=9, color=MUTED, va="center")
        for column, row in enumerate(pair["rows"]):
            x = label + column * (1 + gap)
            axis.imshow(shown[row], extent=(x, x + 1, y + 1, y), interpolation="bilinear", zorder=1)
            axis.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=FRAME, linewidth=0.8, zorder=2))
    return write(figure, Path(path))


def _nearest(queries: Tensor, candidates: Any, k: int) -> tuple[list[list[int]], list[list[float]]]:
    parts = list(nearest(queries, candidates, k))
    return [row for _, _, part in parts for row in part.tolist()], [row for _, part, _ in parts for row in part.tolist()]


def _wrapped(text: str, width: int, lines: int) -> str:
    return textwrap.fill(text, width, max_lines=lines, placeholder=" …").replace("$", r"\$")
