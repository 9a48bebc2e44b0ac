"""benchmarks.cards: the work of a model, the fit, and the line of JSON."""

import json

import pytest
import torch

from benchmarks import cards
from simplclip.plan.cards import CARDS, RATES, Work, step_ms

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="torch is a build without CUDA")


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_the_work_of_a_model(layout):
    """ResNet-18 has 1.81 billion multiply-adds an image."""
    for mode in ("infer", "train"):
        works = cards.works(mode, layout, "resnet18", 8, 224)
        assert sum(work.flops for work in works) / 16 == pytest.approx(1.814e9, rel=0.01)
        kinds = {(work.kind, work.nchw) for work in works if work.flops}
        assert kinds == {("product", False), ("convolution", layout == "nchw")}
        assert {work.runs for work in works if work.flops} == {int(mode == "train")}


def test_a_fit_finds_the_constants_of_made_steps(monkeypatch):
    true = dict(zip(cards.KINDS, (0.9, 0.7, 0.25, 0.25, 0.1, 0.5, 0.7, 0.8, 0.65, 0.004)))
    monkeypatch.setitem(RATES, ("rtx-3090", "infer"), true)
    sizes = [("resnet18", 64), ("resnet18", 8), ("vit_tiny_patch16_224", 64), ("resnet34", 32)]
    steps = []
    for model, batch in sizes:
        works = cards.works("infer", "nhwc", model, batch, 224)
        ms = step_ms(works, "rtx-3090")
        steps.append(cards.Measured("rtx-3090", "infer", "nhwc", model, batch, 224, ms))
    found = cards.fit(steps)
    for kind in ("product", "convolution", "bytes"):
        assert found[kind] == pytest.approx(true[kind], rel=0.15), kind


def test_a_file_of_measured_steps(tmp_path, capsys):
    """Columns that it lacks come from the options; models that are not asked for are left out."""
    path = tmp_path / "steps.csv"
    path.write_text("model,batch,size,ms\nresnet18,256,224,75\nresnet34,256,224,1\nnone,1,1,1\n")
    options = ["--mode", "train", "--layout", "nhwc", "--card", "rtx-3090"]
    cards.main(["--file", str(path), *options, "--models", "resnet18", "none"])
    shown = capsys.readouterr()
    last = json.loads(shown.out.splitlines()[-1])
    assert list(last) == ["models", "median_error", "within_35", "below_bound"]
    assert (last["models"], last["within_35"], last["below_bound"]) == (1, 1, 0)
    assert "none: not counted: " in shown.err


def test_rates_are_plausible():
    for row in RATES.values():
        assert len(row) <= 10
        assert all(0 < share <= 1.05 for share in row.values())
    ms = {card: step_ms([Work("bytes", 0, 1e9, True, 1)], card) for card in CARDS}
    assert ms["h100"] < ms["rtx-4090"] < ms["rtx-3090"] < ms["rtx-3060"]
