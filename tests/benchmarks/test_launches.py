"""Launches and host time of a loss, measured without a GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from benchmarks import launches
from benchmarks.cards import calls
from simplclip.ops import similarity_loss
from support.programs import forked


@pytest.mark.slow
def test_launches_and_time_of_a_loss(monkeypatch):
    monkeypatch.setattr(calls, "LOSSES", {"sigmoid": ("sigmoid",)})

    def measure() -> None:
        (row,) = launches.measure(2)
        assert (row["call"], row["triton_launches"]) == ("sigmoid", 1)
        assert 10 < row["torch_launches"] < 25
        assert 50 < row["host_us"] < 1e6
        x = torch.ones(2, 4)
        assert similarity_loss(x, x, 1.0)["contrastive"] > 0  # by the CPU's kernels again

    # steps behind a planned one start autograd's threads, with which a process cannot be forked
    assert forked(measure) == 0
