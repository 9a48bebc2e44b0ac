"""Brace patterns, such as train-{000000..000003}.tar, that cannot name more files than anybody has."""

from __future__ import annotations

import math
import re
from itertools import accumulate

import braceexpand

from simplclip.common.errors import InputError

MOST = 1_000_000  # names of one pattern
DEPTH = 20  # most levels of nested braces
_INNERMOST = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
_LETTERS = re.compile(r"[A-Za-z]\.\.[A-Za-z](?:\.\.-?\d+)?")
_COUNTED = re.compile("\0([0-9]+)\0")  # replaces a pair of braces by the number of names that it stands for


def expanded(pattern: str, name: str, escape: bool = True) -> list[str]:
    """Expands a pattern into names. name: the argument's name in errors. escape: a backslash escapes the next character."""
    shown = repr(pattern if len(pattern) <= 200 else pattern[:200] + "...")
    if max(accumulate((c == "{") - (c == "}") for c in pattern), default=0) > DEPTH:
        raise InputError(f"{name}: expected braces in at most {DEPTH} others, got {shown}")
    try:
        if _most(pattern, escape) > MOST:
            raise InputError(f"{name}: expected a pattern of at most {MOST:,} names, got {shown} of more")
        return list(braceexpand.braceexpand(pattern, escape))
    except braceexpand.UnbalancedBracesError:  # type: ignore[attr-defined]
        raise InputError(f"{name}: expected as many '}}' as '{{', got {shown}") from None
    except InputError:
        raise
    except ValueError as error:  # a number of 5,000 digits
        raise InputError(f"{name}: expected a brace pattern, got {shown}: {error}") from None


def _most(pattern: str, escape: bool) -> int:
    """Bounds the number of names, innermost braces first, since braceexpand holds the names of each pair in memory."""
    text = re.sub(r"\\.", "", pattern, flags=re.DOTALL) if escape else pattern
    text = text.replace("\0", "")
    while _INNERMOST.search(text):
        text = _INNERMOST.sub(lambda found: f"\0{min(_inside(found[1]), MOST + 1)}\0", text)
    return _product(text)


def _inside(text: str) -> int:
    """Bounds the number of names of a text between innermost braces, which is a range or alternatives."""
    if found := _RANGE.fullmatch(text):
        first, last, step = (int(part or 0) for part in found.groups())
        return abs(last - first) // (abs(step) or 1) + 1
    if _LETTERS.fullmatch(text):
        return 58  # at most, from A to z
    return sum(map(_product, text.split(",")))


def _product(text: str) -> int:
    return math.prod(map(int, _COUNTED.findall(text)))
