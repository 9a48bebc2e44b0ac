"""A run that all tests of evaluation read."""

import pytest

from simplclip import train
from support.train import tiny


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Returns the folder of a run of 30 steps."""
    folder = tmp_path_factory.mktemp("trained")
    train.run(tiny.settings(folder, "run.steps=30", "optim.lr=2e-3", "data.augment=none"))
    return folder / "run"
