"""JSON of files that may come from anywhere. Imports neither numpy nor Pillow."""

from __future__ import annotations

import json
from typing import Any

# lists and objects within each other in a json; at about 500 Python can read but not pickle it
DEEPEST = 100


def json_of(data: str | bytes) -> Any:
    """Returns the value that a JSON text stands for; NaN, as pandas has missing values, is None.

    Raises ValueError for any error in it, also for more than DEEPEST levels of lists and objects.
    """
    try:
        content = json.loads(data, parse_constant=_number_of)
        _check_depth([content], DEEPEST)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return content


def _number_of(constant: str) -> float | None:
    """Returns the value of NaN, None, or of Infinity or -Infinity in a JSON text."""
    return None if constant == "NaN" else float(constant)


def _check_depth(content: dict | list, levels: int) -> None:
    """Raises RecursionError for more than `levels` levels of lists and objects in `content`."""
    if levels < 0:
        raise RecursionError
    values = content.values() if isinstance(content, dict) else content
    for value in values:
        if isinstance(value, (dict, list)):
            _check_depth(value, levels - 1)
