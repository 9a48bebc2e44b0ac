"""No test of the data hangs: one that takes too long fails."""

import signal

import pytest
from PIL import Image

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


@pytest.fixture
def horizontal_first(monkeypatch):
    """Resizes RGB and grey horizontally first.

    Pillow 13 does not always: a fifth of open_clip's pixels change by a level.
    """
    both = Image.Image.resize

    def resize(image, size, resample, *options):
        if image.mode in ("RGB", "L"):
            image = both(image, (size[0], image.height), resample, *options)
        return both(image, size, resample, *options)

    monkeypatch.setattr(Image.Image, "resize", resize)
