"""Options of the test run."""

import os

import pytest
import torch
from paths import ROOT

# torch's cache of compiled graphs does not know that an op's schema has changed: another checkout's graphs would be taken.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / "build" / "inductor"))
# What --prove sets: all schedules of the emulator, and how many kills and faults the trainer meets.
PROOF = {"SIMPLCLIP_EMULATE_ALL": "1", "SIMPLCLIP_TEST_KILLS": "20", "SIMPLCLIP_FAULTS": "30", "SIMPLCLIP_TEST_STRIDE": "1"}
# Fixtures that take long to make: who uses one is slow.
SLOW = {"kernels", "single", "double", "documented_runs", "tiny", "vit", "trained", "of_two_ranks"}


def pytest_addoption(parser):
    parser.addoption("--prove", action="store_true", help="proofs at full length, for hours (make prove)")
    parser.addoption(
        "--cases",
        type=int,
        help="random calls of test_properties.py (default: 2000; with --prove 50000), or "
        "archives of test_fuzz.py (500; with --prove 10000)",
    )
    parser.addoption("--first-case", type=int, default=0, help="the number of the first; with --cases 1 the one that failed")


def pytest_configure(config):
    if config.option.prove:
        for name, value in PROOF.items():
            os.environ.setdefault(name, value)


def pytest_generate_tests(metafunc):
    """The random calls and archives in blocks, so that a run shows how far it is."""
    for fixture, few, all_of_them, size in (("block", 2000, 50000, 500), ("archives", 500, 10000, 100)):
        if fixture in metafunc.fixturenames:
            option = metafunc.config.option
            first, count = option.first_case, option.cases or (all_of_them if option.prove else few)
            blocks = [range(at, min(at + size, first + count)) for at in range(first, first + count, size)]
            metafunc.parametrize(fixture, blocks, ids=[f"{block.start}-{block.stop - 1}" for block in blocks])


def pytest_collection_modifyitems(config, items):
    for item in items:
        if SLOW.intersection(item.fixturenames):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("prove") and not config.option.prove:
            item.add_marker(pytest.mark.skip(reason="a proof: make prove"))
