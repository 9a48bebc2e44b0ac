"""What a picture draws: its texts, and whether they and its boxes lie within the picture and beside
each other.
"""

import contextlib
import itertools
from unittest import mock

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from simplclip.common import plotting

PIXEL = 1.0  # by which boxes may overlap: letters are anti-aliased


@contextlib.contextmanager
def figures():
    """Context that yields a list, which gets each figure that plotting writes."""
    written, original = [], plotting.png

    def recorded(figure):
        written.append(figure)
        return original(figure)

    with mock.patch.object(plotting, "png", recorded):
        yield written


def drawn(figure):
    """Returns the texts that a figure draws with their boxes, the boxes of its images, and those of
    its frames, in pixels.
    """
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = []
    original = Text.draw

    def recorded(self, *arguments, **options):
        if self.get_visible() and self.get_text().strip():
            texts.append((self.get_text(), self.get_window_extent(renderer)))
        return original(self, *arguments, **options)

    with mock.patch.object(Text, "draw", recorded):
        figure.draw(renderer)
    images = [image.get_window_extent(renderer) for axis in figure.axes for image in axis.images]
    frames = [
        p.get_window_extent(renderer)
        for axis in figure.axes
        for p in axis.patches
        if type(p) is Rectangle
    ]
    return texts, images, frames


def overlap(a, b):
    return min(a.x1, b.x1) - max(a.x0, b.x0) > PIXEL and min(a.y1, b.y1) - max(a.y0, b.y0) > PIXEL


def inside(a, b):
    return (
        a.x0 >= b.x0 - PIXEL
        and a.y0 >= b.y0 - PIXEL
        and a.x1 <= b.x1 + PIXEL
        and a.y1 <= b.y1 + PIXEL
    )


def check_layout(figure):
    """Checks that nothing overlaps or lies outside; returns the texts.

    A frame holds all of a text or nothing of it.
    """
    texts, images, frames = drawn(figure)
    for name, box in [
        *texts,
        *(("image", box) for box in images),
        *(("frame", box) for box in frames),
    ]:
        assert inside(box, figure.bbox), f"outside of the picture: {name!r}"
    for (first, a), (second, b) in itertools.combinations(
        [*texts, *(("image", box) for box in images)], 2
    ):
        assert not overlap(a, b), f"{first!r} overlaps {second!r}"
    for name, box in texts:
        for frame in frames:
            assert not overlap(box, frame) or inside(box, frame), f"{name!r} crosses a frame"
    return [name for name, _ in texts]
