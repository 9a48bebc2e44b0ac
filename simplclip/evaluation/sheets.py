"""Sheets: some of the best, middle and worst queries of a split, with their nearest candidates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from simplclip.common.plotting import GREY, any_text, shortened, write
from simplclip.evaluation.index import Index

TOP = 5  # answers of a query
PARTS = ("best", "middle", "worst")
EACH = 2  # queries of each part
WIDTH, ROW, HEAD = 8.0, 1.5, 1.2  # inches; a row has a query
LARGEST = (160, 160)  # pixels of a picture
GREEN = "#1a9850"
LEGEND = "green: the right answer; with #23 it is the 23rd; the numbers are similarities"


class Answer(NamedTuple):
    """A candidate that a query found, or the right one if it found others."""

    row: int
    label: str  # its similarity; "#23  0.18" of a right one that is only the 23rd
    right: bool


class Query(NamedTuple):
    """A query, one of PARTS or "", and its answers."""

    row: int
    part: str
    answers: list[Answer]


def write_sheet(picture: Path, index: Index, title: str, subtitles: Sequence[str]) -> None:
    """Writes a contact sheet to the file `picture`, which is replaced."""
    write(contact_sheet(index, title, subtitles), picture)


def contact_sheet(index: Index, title: str, subtitles: Sequence[str] = ()) -> Figure:
    """Returns a figure of captions with their TOP nearest images, and the reverse.

    It shows the best, middle and worst queries by the rank of the right answer (same group), which
    is green and, where it is not among the nearest, comes last with its rank. index: one with
    captions, whose images are read again. subtitles: more lines of the title.
    """
    texts = index.text_features, index.caption_groups
    images = index.image_features, index.groups
    by_text, by_image = queries_of(*texts, *images), queries_of(*images, *texts)
    found = [answer.row for query in by_text for answer in query.answers]
    found += [query.row for query in by_image]
    pictures = index.data.pictures(index.rows[row].position for row in found)
    for image in pictures.values():
        image.thumbnail(LARGEST)

    def show(axis: Axes, row: int, label: str, right: bool = False) -> None:
        axis.imshow(pictures[index.rows[row].position])
        axis.set_frame_on(True)
        axis.set_xlabel(label, fontsize=8, color=GREY)
        axis.spines[:].set(color=GREEN if right else "#d0d7de", linewidth=3 if right else 0.8)

    lines = [shortened(title, 90), *(shortened(line, 110) for line in subtitles), LEGEND]
    count = len(by_text) + len(by_image)
    height = ROW * count + HEAD
    edges = {"left": 0.02, "right": 0.98, "top": 1 - HEAD / height, "bottom": 0.3 / height}
    with any_text():
        figure = Figure(figsize=(WIDTH, height), dpi=100)
        figure.suptitle("\n".join(lines), fontsize=9, y=1 - 0.1 / height)
        axes = figure.subplots(count, TOP + 1, squeeze=False, gridspec_kw={**edges, "hspace": 0.5})
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[], frame_on=False)
        for row, query in zip(axes, by_text):
            caption = f"{query.part}: {index.captions[query.row]}".removeprefix(": ")
            row[0].set_title(shortened(caption, 110), fontsize=9, loc="left")
            for axis, answer in zip(row, query.answers):
                show(axis, answer.row, answer.label, answer.right)
        for row, query in zip(axes[len(by_text) :], by_image):
            show(row[0], query.row, query.part)
            for line, answer in enumerate(query.answers):
                text = f"{answer.label:>10}  {shortened(index.captions[answer.row], 85)}"
                color = GREEN if answer.right else GREY
                row[1].text(0, 0.85 - line / (TOP + 1), text, fontsize=8, color=color)
    return figure


def queries_of(
    queries: Tensor, groups: Tensor, candidates: Tensor, candidate_groups: Tensor
) -> list[Query]:
    """Returns the queries to show, the one with the best rank of its right answer first.

    A wrong candidate of the same similarity ranks before the right one. Queries without a right
    candidate are left out. Memory: 64 MiB of similarities and as much for comparisons.
    """
    ranked: list[tuple[int, float, int, int]] = []
    size = max(1, 2**24 // len(candidates))
    for start in range(0, len(queries), size):
        scores = queries[start : start + size] @ candidates.T
        right = candidate_groups == groups[start : start + size, None]
        best, rows = scores.masked_fill(~right, -torch.inf).max(1)
        ranks = 1 + (~right & (scores >= best[:, None])).sum(1)
        numbers = range(start, start + len(scores))
        ranked += zip(ranks.tolist(), (-best).tolist(), numbers, rows.tolist())
    ranked = sorted(entry for entry in ranked if entry[1] < torch.inf)
    parts = [""] * len(ranked)
    if len(ranked) >= EACH * len(PARTS):
        middle = (len(ranked) - EACH) // 2
        ranked = ranked[:EACH] + ranked[middle : middle + EACH] + ranked[-EACH:]
        parts = [part for part in PARTS for _ in range(EACH)]
    shown = []
    for (rank, distance, query, right_row), part in zip(ranked, parts):
        values, rows = (queries[query] @ candidates.T).topk(min(TOP, len(candidates)))
        answers = [
            Answer(row, f"{value:.2f}", bool(candidate_groups[row] == groups[query]))
            for row, value in zip(rows.tolist(), values.tolist())
        ]
        if not any(answer.right for answer in answers):
            answers.append(Answer(right_row, f"#{rank:,}  {-distance:.2f}", True))
        shown.append(Query(query, part, answers))
    return shown
