"""What this library's pictures have in common: letters of any script, and whole PNG files."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.figure import Figure

from simplclip.common.files import write_atomically

GREY = "#57606a"
# Fonts of other letters than those of matplotlib's own font; the ones found here are used.
SCRIPTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "Arial Unicode MS",
    "Microsoft YaHei",
)


@contextlib.contextmanager
def any_text() -> Iterator[None]:
    """Context in which figures draw any text: as it is, with two $ too, and boxes for letters that
    no font here has.
    """
    found = set(font_manager.get_font_names())
    family = ["DejaVu Sans", *(name for name in SCRIPTS if name in found)]
    settings: Any = {"text.parse_math": False, "font.family": family}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield


def shortened(text: str, most: int) -> str:
    """Returns text in one line of at most `most` characters, without lone surrogates."""
    # bytes of a file's name that are no UTF-8 are such, which matplotlib refuses
    text = " ".join(text.split()).encode("utf-8", "replace").decode()
    return text if len(text) <= most else f"{text[: most - 1]}…"


def write(figure: Figure, path: Path) -> None:
    """Writes the figure as PNG, completely or not at all; replaces `path`."""
    image = io.BytesIO()
    with any_text():
        figure.savefig(image, format="png")
    write_atomically(path, image.getvalue())
