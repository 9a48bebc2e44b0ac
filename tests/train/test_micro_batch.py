"""data.micro_batch = auto: the largest that fits, and a trial."""

import math

import pytest
import torch

from simplclip.commands.train import predict_micro_batch
from simplclip.train import resolve
from simplclip.train.config import ConfigError
from simplclip.train.setup import make_state
from support.train import tiny
from support.train.runs import go


def searched(sizes, limit, real=math.inf):
    """Searches on a card with `real` bytes, where a pair takes 10 beside 1,000."""

    def peak(pairs):
        if 1000 + 10 * pairs > real:
            raise torch.cuda.OutOfMemoryError
        return 1000 + 10 * pairs

    return resolve.largest_that_fits(sizes, limit, peak)


def test_the_largest_that_fits():
    sizes = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 96]
    for limit, real, pairs in ((1970, 1970, 96), (1250, 9999, 24), (1970, 1300, 24), (1010, 0, 0)):
        if pairs:
            assert searched(sizes, limit, real) == pairs
            continue
        with pytest.raises(ConfigError, match="does not fit, even with 1 pairs at a time"):
            searched(sizes, limit, real)
    with pytest.raises(ConfigError, match="even with 96 pairs at a time"):
        searched([96], 1500)  # a model with batch norms


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [4, 12])
def test_a_trial_runs_a_step(tmp_path, pairs):
    """Of a micro-batch by gradient caching, of the whole batch in one graph."""
    config = tiny.settings(tmp_path, "data.batch_size=12", "data.captions_per_image=1")
    state = make_state(config, torch.device("cpu"), "fp32")
    assert math.isfinite(resolve.run_step(state, 12, pairs)["loss"])


@pytest.mark.slow
def test_without_a_gpu_it_is_predicted(tmp_path, capsys):
    config = tiny.settings(tmp_path, "data.micro_batch=auto", "run.steps=1")
    with pytest.raises(ConfigError, match="data.micro_batch: expected a number, got auto"):
        go(config)
    assert predict_micro_batch(config).data.micro_batch is None
    assert "data.micro_batch = null fits, by simplclip plan" in capsys.readouterr().out
