"""What holds for every hostile file."""

import resource

import pytest

GIB = 1 << 20  # of ru_maxrss, in KiB


@pytest.fixture(autouse=True)
def harmless(tmp_path, monkeypatch):
    """In a folder of its own: no command has made its canary, nothing is written there, and less than 1 GiB was taken."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert not list(tmp_path.rglob("canary"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GIB
