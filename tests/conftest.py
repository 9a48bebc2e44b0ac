"""Options of the test run."""

import os

from paths import ROOT

# torch's cache of compiled graphs does not know that an op's schema has changed: another checkout's graphs would be taken.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / "build" / "inductor"))


def pytest_addoption(parser):
    parser.addoption("--cases", type=int, default=2000, help="random calls of test_properties.py (the long proof: 50000)")
    parser.addoption("--first-case", type=int, default=0, help="the number of the first; with --cases 1 the one that failed")


def pytest_generate_tests(metafunc):
    """The random calls in blocks, so that a run shows how far it is."""
    if "block" in metafunc.fixturenames:
        first, count, size = metafunc.config.getoption("--first-case"), metafunc.config.getoption("--cases"), 500
        blocks = [range(at, min(at + size, first + count)) for at in range(first, first + count, size)]
        metafunc.parametrize("block", blocks, ids=[f"{block.start}-{block.stop - 1}" for block in blocks])
