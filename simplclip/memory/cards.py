"""The memory of cards."""

from __future__ import annotations

import difflib
import re

from simplclip.common.errors import InputError
from simplclip.train.limits import GIB

CARDS = {
    "rtx-3090": 24 * GIB,
    "rtx-4090": 24 * GIB,
    "rtx-3060": 12 * GIB,
    "a100-40": 40 * GIB,
    "a100-80": 80 * GIB,
}
_UNITS = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_memory(text: str) -> int:
    """The bytes of "24GiB", "24000MB" or a card in `CARDS`. Raises InputError."""
    name = re.sub(r"[\s_]+", "-", text.strip().lower())
    name = name if name in CARDS else f"rtx-{name}" if f"rtx-{name}" in CARDS else name
    if name in CARDS:
        return CARDS[name]
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)", text.strip().upper())
    if not match or not float(match[1]):
        near = difflib.get_close_matches(name, CARDS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"memory: expected a size such as 24GiB or one of {', '.join(CARDS)}, got {text!r}{hint}")
    return int(float(match[1]) * _UNITS[match[2]])
