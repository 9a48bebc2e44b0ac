"""The pictures of an evaluation and of a run: which queries they show; any text is drawn."""

import csv
import json

import pytest
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgba
from PIL import Image

from simplclip import data
from simplclip.common.plotting import write
from simplclip.evaluation import contact_sheet
from simplclip.evaluation.sheets import GREEN, queries_of
from simplclip.train import log
from support.data.pairs import png
from support.data.pairs import write as write_shard
from support.evaluation import index_of

LONG = "a very long caption that has more words than a line of the sheet can hold, and more, on and"
HARD = (
    "漢字だけの長い説明文" * 12,
    "x" * 300,
    "$a$ and $b$",
    "العربية",
    "🙂 smile",
    "\ud800",
    LONG,
)


def test_best_middle_and_worst_queries_with_the_rank_of_the_right_answer():
    n = 30
    scores = torch.zeros(n, n)
    for i in range(n):  # the right answer of query i is at rank i + 1
        order = [j for j in range(n) if j != i]
        order.insert(i, i)
        scores[i, order] = torch.linspace(1, 0.1, n)
    shown = queries_of(scores, torch.arange(n), torch.eye(n), torch.arange(n))
    assert [query.row for query in shown] == [0, 1, 14, 15, 28, 29]
    assert [query.part for query in shown] == ["best"] * 2 + ["middle"] * 2 + ["worst"] * 2
    for query in shown:
        right = [answer for answer in query.answers if answer.right]
        assert [answer.row for answer in right] == [query.row]
        if query.row >= 5:
            assert query.answers[-1] == right[0]
            assert right[0].label == f"#{query.row + 1}  {scores[query.row, query.row]:.2f}"


def test_ranks_are_the_plain_ones_and_ties_rank_behind():
    generator = torch.Generator().manual_seed(2)
    x, y = (F.normalize(torch.randn(n, 6, generator=generator), dim=1) for n in (5, 50))
    gx = torch.tensor([0, 1, 2, 3, 99])
    gy = torch.randint(0, 30, (50,), generator=generator)
    gy[:4] = torch.arange(4)
    shown = queries_of(x, gx, y, gy)
    assert sorted(query.row for query in shown) == [0, 1, 2, 3], "the last has no right answer"
    for query in shown:
        order = (x[query.row] @ y.T).argsort(descending=True).tolist()
        assert [answer.row for answer in query.answers[:5]] == order[:5]
        rank = [int(gy[row]) for row in order].index(query.row) + 1
        assert any(answer.right for answer in query.answers[:5]) == (rank <= 5)
        if rank > 5:
            assert query.answers[5].label.startswith(f"#{rank}  ")
    right = torch.tensor([3])
    (tied,) = queries_of(torch.ones(1, 1), right, torch.ones(9, 1), 1 + torch.arange(9))
    assert [answer.label for answer in tied.answers if answer.right][-1] in ("1.00", "#9  1.00")


@pytest.mark.parametrize("count", [1, 9])
def test_any_caption_is_drawn_and_the_right_answers_are_green(tmp_path, count):
    rows = []
    for i in range(count):
        record = json.dumps({"captions": [HARD[i % len(HARD)]], "group": i}).encode()
        rows.append((f"k{i}", {"png": png(i, [(12, 12), (8, 30), (30, 8)][i % 3]), "json": record}))
    eye = torch.eye(count)
    held = data.held_out(write_shard(tmp_path / "a.tar", rows))
    figure = contact_sheet(index_of(held, eye, eye), LONG, (LONG, LONG))
    write(figure, tmp_path / "sheet.png")
    width, height = Image.open(tmp_path / "sheet.png").size
    assert width == 800
    assert height < 2000, "a screen or two"
    green = [
        axis
        for axis in figure.axes
        if axis.images and axis.spines["left"].get_edgecolor() == to_rgba(GREEN)
    ]
    texts = [text for axis in figure.axes for text in axis.texts if text.get_color() == GREEN]
    assert len(green) == len(texts) == min(count, 6), "one of each query"


def table(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)


def test_curves_of_a_run(tmp_path):
    metrics = [
        {"step": s, "loss": 5 / s, "a_loss": 1 / s, "logit_scale": 14, "grad_norm": "", "lr": 0.1}
        for s in (10, 20, 30)
    ]
    table(tmp_path / "metrics.csv", metrics)
    log.write_curves(tmp_path)
    plain = Image.open(tmp_path / "curves.png").size
    # a crash has cut off the row of the other direction
    row = {"step": 20, "split": "$5_部 2", "direction": "image_to_text", "R@1": 0.5, "loss": 3.0}
    table(tmp_path / "evaluation.csv", [row | {"chance R@1": 0.1}])
    log.write_curves(tmp_path)
    more = Image.open(tmp_path / "curves.png").size
    assert more == (800, plain[1] + 200), "recall is a panel more"
