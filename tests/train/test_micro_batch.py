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


def searched(sizes, limit, real=math.inf, checkpointed=None):
    """Searches on a card with `real` bytes, where a pair takes 10 beside 1,000.

    checkpointed: the bytes of a pair once blocks are checkpointed; None: they cannot be.
    """
    bytes_of_pair = [10]

    def peak(pairs):
        bytes_of_step = 1000 + bytes_of_pair[-1] * pairs
        if bytes_of_step > real:
            raise torch.cuda.OutOfMemoryError
        return bytes_of_step

    checkpoint = checkpointed and (lambda: bytes_of_pair.append(checkpointed))
    return resolve.what_fits(sizes, limit, peak, checkpoint)


def test_the_largest_that_fits():
    sizes = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 96]
    assert searched(sizes, 1970) == (96, False)
    assert searched(sizes, 1970, checkpointed=2) == (96, False)
    for limit, real in ((1250, 9999), (1970, 1300)):
        assert searched(sizes, limit, real) == (24, False)
        assert searched(sizes, limit, real, checkpointed=4) == (24, False)
        assert searched(sizes, limit, real, checkpointed=2) == (96, True)
    with pytest.raises(ConfigError, match="does not fit, even with 1 pairs at a time"):
        searched(sizes, 1010, 0, checkpointed=2)
    with pytest.raises(ConfigError, match="even with 96 pairs at a time"):
        searched([96], 1500)  # a model with batch norms
    assert searched([96], 1500, checkpointed=2) == (96, True)


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
