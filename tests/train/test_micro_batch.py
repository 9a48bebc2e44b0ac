"""data.micro_batch = auto: the largest that fits, from a line and trials, and a trial."""

import math

import pytest
import torch

from simplclip.commands.train import predict_micro_batch
from simplclip.train import micro_batch
from simplclip.train.config import ConfigError
from simplclip.train.setup import make_state
from support.train import tiny
from support.train.runs import go

DIVISORS = [48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1]  # of 96


def searched(limit, real, size=96, micro_batches=DIVISORS):
    """Searches on a card with `real` bytes, where a pair takes 10 beside 1,000; returns the pairs
    at a time that were tried, too.
    """
    tried = []

    def peak(pairs):
        tried.append(pairs)
        if 1000 + 10 * pairs > real:
            raise torch.cuda.OutOfMemoryError
        return 1000 + 10 * pairs

    return micro_batch.largest_that_fits(size, micro_batches, limit, peak), tried


def test_the_line_says_where_to_begin():
    assert searched(1970, math.inf) == (None, [4, 8, 96])
    assert searched(1250, math.inf) == (24, [4, 8, 24])
    assert searched(1000, math.inf) == (1, [4, 8, 1])


def test_half_as_many_are_tried_where_memory_runs_out():
    assert searched(1970, 1300) == (24, [4, 8, 96, 48, 24])
    assert searched(1970, 1070) == (4, [4, 8, 4])
    assert searched(1970, 1010)[0] == 1


def test_nothing_fits():
    with pytest.raises(ConfigError, match="does not fit, even with 1 pairs at a time"):
        searched(1970, 900)
    with pytest.raises(ConfigError, match="even with 96 pairs at a time"):
        searched(1970, 1500, micro_batches=[])  # a model with batch norms


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [4, 12])
def test_a_trial_runs_a_step(tmp_path, pairs):
    """Of a micro-batch by gradient caching, of the whole batch in one graph."""
    config = tiny.settings(tmp_path, "data.batch_size=12", "data.captions_per_image=1")
    state = make_state(config.replaced(data={"micro_batch": None}), torch.device("cpu"), "fp32")
    figures = micro_batch.run_step(state, pairs)
    assert math.isfinite(figures["loss"])
    assert state.config.data.batch_size == 12


@pytest.mark.slow
def test_without_a_gpu_it_is_predicted(tmp_path, capsys):
    config = tiny.settings(tmp_path, "data.micro_batch=auto", "run.steps=1")
    with pytest.raises(ConfigError, match="data.micro_batch: expected a number, got auto"):
        go(config)
    assert predict_micro_batch(config).data.micro_batch is None
    assert "data.micro_batch = null fits, by simplclip plan" in capsys.readouterr().out
