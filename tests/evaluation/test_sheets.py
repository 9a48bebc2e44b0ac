"""The pictures of an evaluation, of a run and of a search: what they draw, and where; not their
pixels.
"""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from simplclip import data, evaluation
from simplclip.common import plotting
from simplclip.data.transforms import ImageTransform, PreprocessCfg
from simplclip.evaluation import sheets, split
from simplclip.train import curves
from support import drawings
from support.data.pairs import png, write
from support.evaluation import blank, index_of

pytestmark = pytest.mark.filterwarnings("ignore:Glyph .* missing:UserWarning")


def index_at(path, captions, features, groups=None, transform=blank):
    records = [
        {"captions": [text], **({"group": groups[i]} if groups else {})}
        for i, text in enumerate(captions)
    ]
    shapes = [(12, 12), (8, 30), (30, 8)]
    rows = [
        (f"k{i:03}", {"png": png(i, shapes[i % 3]), "json": json.dumps(record).encode()})
        for i, record in enumerate(records)
    ]
    return index_of(data.held_out(write(path, rows)), None, *features, transform)


def features(ranks, seed=0):
    """Returns image and text features [n, n] such that the caption `i` finds its image at rank
    ranks[i].
    """
    n = len(ranks)
    scores = torch.rand(n, n, generator=torch.Generator().manual_seed(seed)) * 0.5 - 0.6
    for i, rank in enumerate(ranks):
        order = [j for j in scores[i].argsort(descending=True).tolist() if j != i]
        order.insert(rank - 1, i)
        scores[i, order] = scores[i].sort(descending=True).values
    return torch.eye(n), scores


def sheet_of(encoded, path, **titles):
    with drawings.figures() as figures:
        evaluation.contact_sheet(path, encoded, **{"title": "model, step 7: held"} | titles)
    return figures[0]


def test_best_middle_and_worst_queries_with_the_rank_of_the_right_answer(tmp_path):
    captions = [f"caption {i}" for i in range(30)]
    transform = ImageTransform(PreprocessCfg(size=(16, 16)))
    encoded = index_at(tmp_path / "a.tar", captions, features([*range(1, 31)]), transform=transform)
    figure = sheet_of(encoded, tmp_path / "s.png", subtitles=("R@1 of captions", "R@1 of pictures"))
    texts = drawings.check_layout(figure)
    start = texts.index("Caption → nearest pictures")
    end = texts.index("Picture → nearest captions")
    first = texts[start:end]
    headings = [text for text in first if text in sheets.PARTS]
    assert headings == ["Best", "Middle", "Worst"]
    shown = [int(text.split()[1]) for text in first if text.startswith("caption ")]
    assert shown == [0, 1, 2, 12, 13, 14, 15, 16, 17, 27, 28, 29]
    missed = [text for text in first if text.startswith("#")]
    assert [text.partition(":")[0] for text in missed] == [f"#{i + 1}" for i in shown[3:]]
    for i, text in zip(shown[3:], missed):
        assert text.endswith(f": {encoded.text_features[i, i]:.2f}")
    scores = [text for text in first if re.fullmatch(r"-?[01]\.\d\d", text)]
    assert len(scores) == 12 * 5, "of each query five answers have a score"
    words = " ".join(texts)
    for part in ("model, step 7: held", "R@1 of captions", "R@1 of pictures", sheets.LEGEND):
        assert part in words
    second = texts[end:]
    assert len([text for text in second if re.fullmatch(r"(#\d+: )?-?[01]\.\d\d", text)]) >= 60
    images = figure.axes[0].images
    assert len(images) == 12 * 5 + len(missed) + 12
    # not 16 x 16 as stored
    assert {image.get_array().shape[:2] for image in images} == {(160, 160)}
    assert Image.open(tmp_path / "s.png").width == round(plotting.WIDTH * plotting.DPI)


def green(figure):
    return sum(
        patch.get_edgecolor()[:3] == pytest.approx((0x1A / 255, 0x98 / 255, 0x50 / 255))
        for patch in figure.axes[0].patches
    )


def test_right_answers_are_framed_also_those_of_a_group(tmp_path):
    captions, eye = [f"c {i}" for i in range(6)], torch.eye(6)
    encoded = index_at(tmp_path / "a.tar", captions, (eye, eye))
    assert green(sheet_of(encoded, tmp_path / "s.png")) == 12, "one of each query"
    # all other answers are nearer
    figure = sheet_of(replace(encoded, text_features=-eye), tmp_path / "s.png")
    assert green(figure) == 12
    assert sum(text.startswith("#6: -1.00") for text in drawings.check_layout(figure)) == 12
    tied = sheet_of(replace(encoded, text_features=torch.ones(6, 6)), tmp_path / "s.png")
    missed = {text for text in drawings.check_layout(tied) if text.startswith("#")}
    assert missed == {"#6: 1.00"}, "wrong answers of the same similarity rank before it"
    several = index_at(tmp_path / "b.tar", captions, (eye, eye), ["g"] * 6)
    figure = sheet_of(several, tmp_path / "s.png")
    assert green(figure) == 12 * 5, "all of a group are right"
    assert not any(text.startswith("#") for text in drawings.check_layout(figure))


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_pictures_are_the_crop_of_the_model(mode):
    """Ours at a multiple of the model's size; open_clip's as its transform crops."""
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (300, 500, 3), np.uint8)
    ).resize((500, 300))
    cfg = PreprocessCfg(size=(48, 48), resize_mode=mode, fill_color=255)
    ours = split.cropped(ImageTransform(cfg), image)
    assert ours.size == (192, 192)
    theirs = split.cropped(open_clip.transform.image_transform_v2(cfg, is_train=False), image)
    assert theirs.size == (48, 48)
    small = np.asarray(ours.resize((48, 48), Image.BOX), float)
    assert np.abs(small - np.asarray(theirs, float)).mean() < 12
    assert split.cropped(blank, image) is image


def test_a_picture_of_a_very_long_image_has_the_size_of_the_model(monkeypatch):
    """Larger, it would have more pixels before its crop than an image may have."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    transform = ImageTransform(PreprocessCfg(size=(8, 8)))
    image = Image.new("RGB", (100, 1), "red")
    assert transform(image).shape == (3, 8, 8)
    assert split.cropped(transform, image).getcolors() == [(64, (255, 0, 0))]


def rows_of(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)


def curves_of(run, splits=("held_out",), steps=60, chance=True, terms=()):
    rng = np.random.default_rng(0)
    metrics = [
        {
            "step": s,
            "loss": 5 / s,
            **{f"{t}_loss": 1 / s for t in terms},
            "logit_scale": 14 + s,
            "logit_bias": -10.0,
            "grad_norm": 100 / s,
            "lr": 1e-3 / s,
        }
        for s in range(1, steps + 1)
    ]
    evaluated = [
        {
            "step": s,
            "split": name,
            "direction": way,
            **{f"R@{k}": rng.random() if s != 40 else 1.0 for k in (1, 5, 10)},
            **({"loss": 3.0, **{f"chance R@{k}": k / 100 for k in (1, 5, 10)}} if chance else {}),
        }
        for s in range(20, steps + 1, 20)
        for name in splits
        for way in ("image_to_text", "text_to_image")
    ]
    rows_of(run / "metrics.csv", metrics)
    if evaluated:
        rows_of(run / "evaluation.csv", evaluated)
    with drawings.figures() as figures:
        curves.write_curves(run)
    return figures[0]


def test_curves_of_an_evaluation_that_a_crash_cut_off(tmp_path):
    """evaluation.csv has a row of one direction only."""
    row = {"step": 20, "split": "held_out", "direction": "image_to_text", "R@1": 0.5, "loss": 3.0}
    rows_of(tmp_path / "metrics.csv", [{"step": step, "loss": 4.0} for step in (10, 20)])
    rows_of(tmp_path / "evaluation.csv", [row])
    curves.write_curves(tmp_path)
    assert (tmp_path / "curves.png").exists()


def test_curves_have_one_axis_of_steps_chance_and_the_best_step(tmp_path):
    figure = curves_of(tmp_path)
    texts = drawings.check_layout(figure)
    assert {axis.get_xlim() for axis in figure.axes} == {(0, 60)}
    assert texts.count("0") <= 3, "the steps have labels at the last axis alone"
    assert "step; dashed: 40, the best evaluation" in texts
    loss, recall, _, scale, norm, bias = figure.axes
    # beside that of training
    assert any(text.startswith("held_out: 3") for text in texts)
    assert len(loss.lines) == 3
    assert {"0%", "100%"} <= {text for text in texts if text.endswith("%")}
    dotted = [line.get_ydata()[0] for line in recall.lines if line.get_linestyle() == ":"]
    assert sorted(set(dotted)) == [0.01, 0.05, 0.1]
    for axis in figure.axes:
        dashed = [set(line.get_xdata()) for line in axis.lines if line.get_linestyle() == "--"]
        assert [steps for steps in dashed if len(steps) == 1] == [{40}]
    kinds = [axis.get_yscale() for axis in (scale, norm, loss, bias)]
    assert kinds == ["log", "log", "linear", "linear"]


@pytest.mark.parametrize("options", [
    {"splits": ()},
    {"splits": ("concepts", "vendor", "部 2 (新) with a long name")},
    {"steps": 20, "chance": False, "splits": ("$5_to_$10", "b")},
    {"steps": 1, "splits": ()},
    pytest.param(
        {"terms": ("contrastive", "pair_matching", "relational", "interactive", "feature")},
        marks=pytest.mark.prove,
    ),
    pytest.param({"steps": 200_000, "splits": ()}, marks=pytest.mark.prove),
])  # fmt: skip
def test_curves_of_any_run_fit(tmp_path, options):
    drawings.check_layout(curves_of(tmp_path, **options))
