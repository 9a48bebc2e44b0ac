"""Evaluation sheets: pictures of queries, best, middle and worst, with their nearest candidates and
the right answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from simplclip.common.plotting import LINE, MARGIN, MUTED, WIDTH, Font, Sheet
from simplclip.evaluation.index import Index
from simplclip.evaluation.retrieval import nearest

TOP = 5  # answers of a query
PARTS = {"Best": 3, "Middle": 6, "Worst": 3}  # queries of each kind
LABEL_FONT = Font(9.5, color=MUTED)
LEGEND = (
    "Green: the right answer. Where it is not among the nearest five it comes last, with its rank: "
    "#23 is the 23rd. The numbers are similarities. Pictures are cropped as the model sees them."
)
GAP, SIDE = 0.1, 0.87  # inches between tiles, and of a tile; six of them are as wide as a sheet


Pictures = dict[int, Image.Image]  # by the row of the image


class Answers(NamedTuple):
    """A query's nearest candidates, the nearest of its right ones, and the rank of that one."""

    query: int
    rows: list[int]
    scores: list[float]
    right: int
    right_score: float
    rank: int
    missed: bool  # whether none of the nearest is right

    def shown(self) -> list[tuple[int, str]]:
        """Returns the rows to draw with their labels: "0.31", of a missed right one "#23: 0.18"."""
        shown = [(row, f"{score:.2f}") for row, score in zip(self.rows, self.scores)]
        if self.missed:
            shown.append((self.right, f"#{self.rank:,}: {self.right_score:.2f}"))
        return shown


def contact_sheet(
    path: str | Path, index: Index, title: str, subtitles: Sequence[str] = ("", "")
) -> Path:
    """Writes a PNG of queries with their nearest answers to `path`, replacing it; returns the path.

    It shows captions with their TOP nearest images, and images with their nearest captions: some of
    the best, of the middle and of the worst, by the rank of the right answer (same group), which is
    framed green and, where it is not among the nearest, comes last with its rank. index: one with
    captions, whose images are read again. subtitles: a line for each half, e.g. its metrics.
    """
    return sheet_of(index, title, subtitles).write(path)


def sheet_of(index: Index, title: str, subtitles: Sequence[str] = ("", "")) -> Sheet:
    """Returns the drawing that `contact_sheet` writes.

    index: one with captions, whose images are read again. subtitles: a line for each half.
    """
    texts = (index.text_features, index.caption_groups)
    images = (index.image_features, index.groups)
    by_text = _chosen(*texts, *images)
    by_image = _chosen(*images, *texts)
    shown: list[int] = []
    for _, answers in by_text:
        shown += [*answers.rows, answers.right]
    shown += [answers.query for _, answers in by_image]
    pictures = index.pictures(list(dict.fromkeys(shown)))
    sheet = Sheet()
    sheet.draw_line(title, Font(13, "bold"), 2)
    sheet.draw_line(LEGEND, Font(color=MUTED), 4)
    headings = "Caption → nearest pictures", "Picture → nearest captions"
    for heading, queries, subtitle in zip(headings, (by_text, by_image), subtitles):
        sheet.y += 0.2
        sheet.draw_line(heading, Font(12, "bold"))
        sheet.draw_line(subtitle, Font(color=MUTED), 2)
        for part, answers in queries:
            sheet.y += 0.14
            if part:
                sheet.y += 0.08
                sheet.draw_line(part, Font(10.5, "bold", MUTED))
                sheet.y += 0.04
            if queries is by_text:
                _draw_images(sheet, index, pictures, answers)
            else:
                _draw_captions(sheet, index, pictures, answers)
    sheet.fit()
    return sheet


def _draw_images(sheet: Sheet, index: Index, pictures: Pictures, answers: Answers) -> None:
    """Draws a caption and the images that answer it in a row; moves `sheet.y` below them."""
    sheet.draw_line(index.captions[answers.query], Font(10.5), 2)
    sheet.y += 0.05
    group = index.caption_groups[answers.query]
    for column, (image, label) in enumerate(answers.shown()):
        x = MARGIN + column * (SIDE + GAP)
        if column == TOP:  # the right answer, which was missed, stands apart
            x += GAP
        right = bool(index.groups[image] == group)
        sheet.draw_tile(pictures[image], x, sheet.y, SIDE, right)
        sheet.draw_text(
            x + SIDE / 2, sheet.y + SIDE + 0.04, label, SIDE, LABEL_FONT, align="center"
        )
    sheet.y += SIDE + 0.04 + LINE * LABEL_FONT.size


def _draw_captions(sheet: Sheet, index: Index, pictures: Pictures, answers: Answers) -> None:
    """Draws an image and, beside it, the captions that answer it; moves `sheet.y` below them."""
    side = 1.1
    x = MARGIN + side + GAP
    sheet.draw_tile(pictures[answers.query], MARGIN, sheet.y, side)
    step = side / (TOP + 1)
    for line, (row, label) in enumerate(answers.shown()):
        y = sheet.y + line * step
        weight = "normal"
        if index.caption_groups[row] == index.groups[answers.query]:
            weight = "bold"
            sheet.draw_box(x, y, (WIDTH - MARGIN - x, step - 0.01))
        caption = index.captions[row]
        font = Font(9.5, weight)
        sheet.draw_text(x + 0.06, y + 0.015, caption, WIDTH - MARGIN - x - 1.05, font)
        sheet.draw_text(WIDTH - MARGIN - 0.06, y + 0.015, label, 0.9, LABEL_FONT, align="right")
    sheet.y += side


def _chosen(
    queries: Tensor, groups: Tensor, candidates: Tensor, candidate_groups: Tensor
) -> list[tuple[str, Answers]]:
    """Returns the queries to show in the order of their ranks, each after its part in PARTS or "".

    Only the first of a part has its heading, and of fewer than 12 queries none.
    """
    answers = list(_answers(queries, groups, candidates, candidate_groups))
    answers.sort(key=lambda answer: (answer.rank, -answer.right_score))
    total = len(answers)
    if total < sum(PARTS.values()):
        return [("", answer) for answer in answers]
    starts = {
        "Best": 0,
        "Middle": (total - PARTS["Middle"]) // 2,
        "Worst": total - PARTS["Worst"],
    }
    chosen = []
    for kind, start in starts.items():
        first, *others = answers[start : start + PARTS[kind]]
        chosen.append((kind, first))
        chosen += [("", answer) for answer in others]
    return chosen


def _answers(
    queries: Tensor, groups: Tensor, candidates: Tensor, candidate_groups: Tensor
) -> Iterator[Answers]:
    """Yields the answers of each query that has a right one, a candidate of its group.

    A wrong candidate of the same similarity ranks before it.
    """
    near_scores: list[list[float]] = []
    near_rows: list[list[int]] = []
    for _, part_scores, part_rows in nearest(queries, candidates, TOP):
        near_scores += part_scores.tolist()
        near_rows += part_rows.tolist()
    size = max(1, 2**24 // len(candidates))
    for start in range(0, len(queries), size):
        scores = queries[start : start + size] @ candidates.T
        right = candidate_groups == groups[start : start + size, None]
        best_scores, best_rows = scores.masked_fill(~right, -torch.inf).max(1)
        ranks = 1 + (~right & (scores >= best_scores[:, None])).sum(1)
        for row, score in enumerate(best_scores.tolist()):
            if score == -torch.inf:  # no candidate is right
                continue
            query = start + row
            yield Answers(
                query,
                near_rows[query],
                near_scores[query],
                right=int(best_rows[row]),
                right_score=score,
                rank=int(ranks[row]),
                missed=not right[row, near_rows[query]].any(),
            )
