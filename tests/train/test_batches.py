"""The samples of a step in small data."""

import pytest

from simplclip.common.errors import InputError
from simplclip.train import objective
from support.train.runs import go
from support.train.tiny import settings

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("workers", "micro_batch"), [(0, "null"), (3, "4")])
def test_samples_that_an_epochs_end_brings_twice_are_no_negatives(
    tmp_path, monkeypatch, workers, micro_batch
):
    """Two epochs of 24 samples in three steps."""
    passed = []
    compute = objective.Objective.__call__

    def recorded(self, step, image, text, scale, bias, group, *teacher):
        passed.append(group)
        return compute(self, step, image, text, scale, bias, group, *teacher)

    monkeypatch.setattr(objective.Objective, "__call__", recorded)
    changes = ["data.batch_size=16", f"data.micro_batch={micro_batch}", f"data.workers={workers}"]
    go(settings(tmp_path, *changes, "run.steps=3", "model.freeze_norms=true"))
    first, second, third = passed
    assert first is None
    assert third is None
    assert len(second) == 16
    assert len(set(second[:8].tolist())) == len(set(second[8:].tolist())) == 8
    assert len(set(second.tolist())) < 16


def test_a_batch_of_more_samples_than_train_is_an_error(tmp_path):
    for changes in (["data.batch_size=25"], ["data.batch_size=32", "data.micro_batch=4"]):
        with pytest.raises(InputError, match="data.batch_size: expected at most 24, the number of"):
            go(settings(tmp_path, *changes, "data.workers=2", "model.freeze_norms=true"))
        assert not (tmp_path / "run").exists()
    go(settings(tmp_path, "data.batch_size=24", "run.steps=1"))
