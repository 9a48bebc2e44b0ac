"""What a picture draws: texts and boxes, which must lie within it and beside each other."""

import contextlib
import itertools
from collections.abc import Iterator
from unittest import mock

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from simplclip.common import plotting

PIXEL = 1.0  # by which boxes may overlap: letters are anti-aliased


@contextlib.contextmanager
def figures() -> Iterator[list[Figure]]:
    """Context that yields a list, which gets each figure that plotting writes."""
    written: list[Figure] = []
    original = plotting.png

    def recording(figure: Figure) -> object:
        written.append(figure)
        return original(figure)

    with mock.patch.object(plotting, "png", recording):
        yield written


def drawn(figure: Figure) -> tuple[list[tuple[str, Bbox]], list[Bbox], list[Bbox]]:
    """Returns the texts that a figure draws with their boxes, the boxes of its images, and those of
    its frames, in pixels.
    """
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = []
    original = Text.draw

    def recording(self, *arguments, **options):
        if self.get_visible() and self.get_text().strip():
            texts.append((self.get_text(), self.get_window_extent(renderer)))
        return original(self, *arguments, **options)

    with mock.patch.object(Text, "draw", recording):
        figure.draw(renderer)
    images = [image.get_window_extent(renderer) for axis in figure.axes for image in axis.images]
    patches = [patch for axis in figure.axes for patch in axis.patches]
    frames = [patch.get_window_extent(renderer) for patch in patches if type(patch) is Rectangle]
    return texts, images, frames


def overlap(a: Bbox, b: Bbox) -> bool:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return min(width, height) > PIXEL


def inside(a: Bbox, b: Bbox) -> bool:
    """Whether `a` lies in `b`."""
    return min(a.x0 - b.x0, a.y0 - b.y0, b.x1 - a.x1, b.y1 - a.y1) >= -PIXEL


def check_layout(figure: Figure) -> list[str]:
    """Checks that nothing overlaps or lies outside; returns the texts.

    A frame holds all of a text or nothing of it.
    """
    texts, images, frames = drawn(figure)
    apart = [*texts, *(("image", box) for box in images)]
    for name, box in [*apart, *(("frame", box) for box in frames)]:
        assert inside(box, figure.bbox), f"outside of the picture: {name!r}"
    for (first, a), (second, b) in itertools.combinations(apart, 2):
        assert not overlap(a, b), f"{first!r} overlaps {second!r}"
    for name, box in texts:
        for frame in frames:
            assert not overlap(box, frame) or inside(box, frame), f"{name!r} crosses a frame"
    return [name for name, _ in texts]
