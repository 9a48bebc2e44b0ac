"""What a run does on a GPU by default: compiled towers, channels_last, timed algorithms; on a CPU
nothing of it.
"""

import functools
import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn

from simplclip import models
from simplclip.common import hardware
from simplclip.train import compilation, config, setup
from support.train import tiny
from support.train.runs import bits, check_resumed, go, state_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def on_gpu(monkeypatch):
    """Lets runs decide as on a GPU, after two steps, that compilation pays; gives torch.compile."""
    monkeypatch.setattr(compilation, "may_compile", lambda state: True)
    monkeypatch.setattr(compilation, "EAGER_STEPS", 2)
    monkeypatch.setattr(compilation, "WORTH_SECONDS", 0)
    compiler = mock.Mock(side_effect=functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch, "compile", compiler)
    return compiler


def decision(folder):
    return state_of(folder)["config"]["run"]["compile"]


@pytest.mark.slow
def test_a_resumed_run_stays_compiled(tmp_path, monkeypatch, on_gpu):
    text = check_resumed(tmp_path, monkeypatch, 4, [])
    assert "compile    the towers" in text
    # of the whole run and of both parts, the resumed one from its start
    assert on_gpu.call_count == 3 * 2
    assert decision(tmp_path / "parts") is True


def failing(graph, inputs):
    raise NotImplementedError("no such compiler")


@pytest.mark.slow
def test_a_run_goes_on_without_a_compiler(tmp_path, monkeypatch, on_gpu):
    """In every bit as if it had not tried."""
    on_gpu.side_effect = functools.partial(on_gpu.side_effect.func, backend=failing)
    text = go(tiny.settings(tmp_path, f"run.out={tmp_path / 'failed'}"))
    assert "warning    compilation failed, the towers run as before: BackendCompilerFailed" in text
    assert decision(tmp_path / "failed") is False
    go(tiny.settings(tmp_path, f"run.out={tmp_path / 'eager'}", "run.compile=false"))
    states = [state_of(tmp_path / name) for name in ("failed", "eager")]
    assert bits(states[0]) == bits(states[1])


@pytest.mark.slow
def test_runs_that_do_not_compile(tmp_path, monkeypatch, on_gpu):
    monkeypatch.setattr(compilation, "WORTH_SECONDS", math.inf)
    go(tiny.settings(tmp_path, f"run.out={tmp_path / 'short'}"))
    assert decision(tmp_path / "short") is False
    monkeypatch.undo()
    go(tiny.settings(tmp_path, f"run.out={tmp_path / 'cpu'}"))
    assert decision(tmp_path / "cpu") == "auto"
    assert not on_gpu.called


def test_where_towers_may_compile():
    assert compilation.may_compile(SimpleNamespace(device=CUDA))
    assert not compilation.may_compile(SimpleNamespace(device=CPU))


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
