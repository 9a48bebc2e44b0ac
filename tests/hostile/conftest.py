"""Checks that hold for every hostile file."""

import resource

import pytest

GIB = 1 << 20  # in KiB, the unit of ru_maxrss


@pytest.fixture(autouse=True)
def harmless(tmp_path, monkeypatch):
    """Runs a test in a folder of its own; no canary is made, memory grows by less than 1 GiB."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert not list(tmp_path.rglob("canary"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GIB
