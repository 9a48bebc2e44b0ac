"""Options of the test run."""

import contextlib
import ctypes
import gc
import os
import signal
from collections.abc import Iterator

import pytest
import torch

from support.paths import ROOT

# torch's cache of compiled graphs does not know that an op's schema has changed, or that
# ATEN_CPU_CAPABILITY has: graphs of another checkout or another kind of CPU would be taken, and
# compute wrong values.
KIND_OF_CPU = os.environ.get("ATEN_CPU_CAPABILITY", "native")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / "build" / "inductor" / KIND_OF_CPU))
# The variables that --prove sets: all cases of other processes, and how often a test disturbs
# processes.
PROOF = {
    "SIMPLCLIP_PROVE": "1",
    "SIMPLCLIP_TEST_STRIDE": "1",
}


@pytest.fixture(autouse=True, scope="module")
def trimmed() -> Iterator[None]:
    """Returns the freed memory of a file's tests to the system: forks of a large process are
    slow.
    """
    yield
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def pytest_addoption(parser):
    parser.addoption(
        "--prove",
        action="store_true",
        help="proofs at full length, about 45 minutes (make prove has more)",
    )
    parser.addoption(
        "--cases",
        type=int,
        help="random calls of test_properties.py (default: 500; with --prove 20000)",
    )
    parser.addoption(
        "--first-case",
        type=int,
        default=0,
        help="the number of the first; with --cases 1 the one that failed",
    )


def pytest_configure(config):
    # A shell ignores SIGINT for a background job and what it starts; tests send it.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # The first backward pass starts a thread for each device, and a fork of a process with such
    # threads has no autograd. Fake tensors pretend that there is a GPU: the pass is not theirs.
    torch.ones((), requires_grad=True).backward()
    if config.option.prove:
        for name, value in PROOF.items():
            os.environ.setdefault(name, value)


def pytest_generate_tests(metafunc):
    """Splits random calls into blocks, so that a run shows its progress."""
    if "block" in metafunc.fixturenames:
        option = metafunc.config.option
        first, count = option.first_case, option.cases or (20000 if option.prove else 500)
        blocks = [
            range(at, min(at + 500, first + count)) for at in range(first, first + count, 500)
        ]
        # make test-quick runs only the first block
        slow = [[], *[[pytest.mark.slow]] * len(blocks)]
        ids = [f"{block.start}-{block.stop - 1}" for block in blocks]
        metafunc.parametrize(
            "block",
            [pytest.param(b, id=name, marks=m) for b, name, m in zip(blocks, ids, slow)],
        )


def pytest_collection_modifyitems(config, items):
    """Skips tests that cannot run here.

    Files that take long come first, so that small files fill the end of a run.
    """
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("prove") and not config.option.prove:
            item.add_marker(pytest.mark.skip(reason="a proof: make prove"))
    long = {item.path for item in items if item.get_closest_marker("long")}
    slow = {
        item.path
        for item in items
        if item.get_closest_marker("slow") or item.get_closest_marker("prove")
    }
    items.sort(key=lambda item: (item.path not in long, item.path not in slow))


def pytest_collection_finish():
    """Leaves out what was collected when Python looks for garbage: it stays to the end."""
    gc.collect()
    gc.freeze()
