"""Contact sheets: pictures of queries and their nearest candidates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from simplclip.common.plotting import FRAME, INK, MUTED, draw_image, draw_text, frame, sheet, wrapped, write
from simplclip.evaluation.retrieval import nearest
from simplclip.evaluation.split import Split

RIGHT = "#1a9850"
ROWS, TOP = 8, 5  # queries of each kind, and answers


def contact_sheet(path: str | Path, split: Split, title: str, subtitles: Sequence[str] = ("", "")) -> Path:
    """Writes a picture of ROWS captions with their TOP nearest images, and ROWS images with their nearest captions.

    split: an encoded split. The queries are drawn at random with a fixed seed. Right answers (same group) are framed green.
    subtitles: a line for each half, e.g. its metrics.
    """
    pick = np.random.default_rng(0)
    texts = sorted(pick.permutation(len(split.captions))[:ROWS].tolist())
    images = sorted(pick.permutation(len(split))[:ROWS].tolist())
    near_images, _ = _nearest(split.text_features[texts], split.image_features, TOP)
    near_texts, similarities = _nearest(split.image_features[images], split.text_features, TOP)
    shown = split.pictures([*{*images, *(image for near in near_images for image in near)}])
    groups, caption_groups = split.groups, split.caption_groups
    gap, tile, label, caption = 0.14, 1.0, 2.3, 3.9
    row_height, line_height = tile + gap, tile / TOP
    right = label + TOP * row_height + 0.6
    width, height = right + tile + gap + caption + 0.1, max(len(texts), len(images)) * row_height
    figure, axis = sheet(width, height, 1.25)

    def picture(image: int, x: float, y: float, hit: bool = False) -> None:
        draw_image(axis, shown[image], x, y)
        frame(axis, x, y, colour=RIGHT if hit else FRAME, line=3.5 if hit else 0.8)

    draw_text(axis, 0, -1.1, title, 15, fontweight="bold")
    frame(axis, width - 1.55, -1.19, 0.18, 0.18, RIGHT, 2.5)
    draw_text(axis, width - 1.25, -1.1, "right answer", 10, MUTED)
    for x, head, line in zip((0, right), ("Caption → nearest images", "Image → nearest captions"), subtitles):
        draw_text(axis, x, -0.62, head, 12)
        draw_text(axis, x, -0.3, line, 10, MUTED)
    for row, query in enumerate(texts):
        y = row * row_height
        draw_text(axis, label - 0.2, y + tile / 2, wrapped(split.captions[query], 22, 4), 10.5, ha="right")
        for column, image in enumerate(near_images[row]):
            picture(image, label + column * row_height, y, bool(groups[image] == caption_groups[query]))
    for row, query in enumerate(images):
        y, x = row * row_height, right + tile + gap
        picture(query, right, y)
        for place, (text, similarity) in enumerate(zip(near_texts[row], similarities[row])):
            middle = y + (place + 0.5) * line_height
            hit = bool(caption_groups[text] == groups[query])
            if hit:
                frame(axis, x, middle - 0.43 * line_height, caption, 0.86 * line_height, RIGHT, 2)
            words = wrapped(split.captions[text], 46, 1)
            draw_text(axis, x + 0.1, middle, words, 9, INK if hit else MUTED, fontweight="bold" if hit else "normal")
            draw_text(axis, x + caption - 0.1, middle, f"{similarity:.2f}", 8, MUTED, ha="right")
    return write(figure, Path(path))


def _nearest(queries: Tensor, candidates: Tensor, k: int) -> tuple[list[list[int]], list[list[float]]]:
    parts = list(nearest(queries, candidates, k))
    return [row for _, _, part in parts for row in part.tolist()], [row for _, part, _ in parts for row in part.tolist()]
