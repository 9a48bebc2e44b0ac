"""No test of the data hangs: one that takes too long fails."""

import signal

import pytest

SECONDS = 300  # of wall time


@pytest.fixture(autouse=True)
def in_wall_time():
    def interrupt(number, frame):
        raise TimeoutError(f"the test took more than {SECONDS} s")

    former = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, former)
