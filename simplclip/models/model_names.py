"""Names of models, checked without torch, so that a wrong one is answered at once."""

from __future__ import annotations

import importlib.util
import sys
from difflib import get_close_matches
from pathlib import Path

from simplclip.common.errors import InputError
from simplclip.models.presets import NAMES

PLAIN = "open_clip:"  # begins the names of open_clip's models


def open_clip_names() -> list[str]:
    """Returns the names of open_clip's models, of its configuration files until it is imported."""
    if "open_clip" in sys.modules:  # perhaps with names that this process has added
        return sys.modules["open_clip"].list_models()
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("No module named 'open_clip'", name="open_clip")
    folder = Path(package.origin).with_name("model_configs")
    return sorted(file.stem for file in folder.glob("*.json"))


def check_name(name: str, argument: str = "name") -> None:
    """Raises InputError, with the nearest names, unless `name` is in NAMES or "open_clip:NAME"."""
    names = [*NAMES, *(PLAIN + plain for plain in open_clip_names())]
    if name not in names:
        near = get_close_matches(name, names, 3) or get_close_matches(PLAIN + name, names, 3)
        raise InputError(
            f"{argument}: expected one of {[*NAMES]} or {PLAIN}NAME, got {name!r}; nearest: {near}"
        )
