"""What a run does on a GPU by default: compiled towers, channels_last, timed algorithms; on a CPU
nothing of it.
"""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn

from simplclip import models
from simplclip.common import hardware
from simplclip.train import config, setup
from support.train import tiny
from support.train.runs import go

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def settings(*changes):
    values = {"data": {"train": "nowhere/*.tar"}, "run": {"out": "runs/none"}}
    return config.from_dict(config.override(values, changes))


GROUPED = SimpleNamespace(visual=nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=2)))
DEPTHWISE = SimpleNamespace(visual=nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8)))


@pytest.mark.parametrize(
    ("model", "expected"),
    [("open_clip:ViT-B-32", False), (GROUPED, False), (DEPTHWISE, True)],
)
def test_layouts(model, expected):
    """Of the image tower on a GPU: channels_last if it gains by it; of a ResNet: the next test."""
    if isinstance(model, str):
        model = models.create(model, device="meta")
    assert setup.runs_channels_last(model, settings(), CUDA) == expected
    assert not setup.runs_channels_last(model, settings(), CPU)
    for given in (True, False):
        assert (
            setup.runs_channels_last(model, settings(f"run.channels_last={given}".lower()), CPU)
            == given
        )


@pytest.mark.parametrize(("device", "last"), [(CUDA, True), (CPU, False)])
def test_the_layout_of_a_prepared_model(device, last):
    model = models.create("open_clip:RN50", device="meta")
    prepared = setup.prepare_model(model, [], [], settings(), device)
    assert model.visual.conv2.weight.is_contiguous(memory_format=torch.channels_last) == last
    assert any("layout" in line for line in prepared.lines) == last


@pytest.mark.slow
def test_algorithms_of_cudnn(tmp_path, monkeypatch):
    seen = []
    timed = mock.Mock(side_effect=hardware.timed_algorithms)
    monkeypatch.setattr(hardware, "timed_algorithms", timed)
    with hardware.timed_algorithms(True):
        seen.append(torch.backends.cudnn.benchmark)
    seen.append(torch.backends.cudnn.benchmark)
    assert seen == [True, False]
    go(tiny.settings(tmp_path, "run.steps=1"))
    assert timed.call_args == mock.call(False)  # on a CPU
