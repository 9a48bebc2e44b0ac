"""Brace patterns, such as train-{000000..000003}.tar, that cannot name more files than anybody has."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import braceexpand as package

from simplclip.common.errors import InputError

braceexpand: Any = package  # whose types lack what is used here
MOST = 1_000_000  # names of one pattern
DEPTH = 20  # of braces in braces


def expanded(pattern: str, name: str, escape: bool = True) -> list[str]:
    """The names of a pattern. name: of the argument, for errors. escape: a backslash makes the next character a literal."""
    shown = repr(pattern if len(pattern) <= 200 else pattern[:200] + "...")
    if max(accumulate((c == "{") - (c == "}") for c in pattern), default=0) > DEPTH:
        raise InputError(f"{name}: expected braces in at most {DEPTH} others, got {shown}")
    try:
        number = _count(pattern, escape)
        if number > MOST:
            raise InputError(f"{name}: expected a pattern of at most {MOST:,} names, got {shown} of more")
        return list(braceexpand.braceexpand(pattern, escape))
    except braceexpand.UnbalancedBracesError:
        raise InputError(f"{name}: expected as many '}}' as '{{', got {shown}") from None
    except InputError:
        raise
    except ValueError as error:  # a number of 5,000 digits
        raise InputError(f"{name}: expected a brace pattern, got {shown}: {error}") from None


def _count(pattern: str, escape: bool) -> int:
    """How many names braceexpand would make, which keeps those of each brace in memory."""
    number = 1
    for part, inside in _split(pattern, escape):
        if inside and number <= MOST:
            number *= _count_inside(part, escape)
    return number


def _count_inside(text: str, escape: bool) -> int:
    if found := braceexpand.int_range_re.match(text):
        first, last, step = (int(part or 0) for part in found.groups())
        return abs(last - first) // (step or 1) + 1
    if braceexpand.char_range_re.match(text):
        return len(braceexpand.alphabet)  # at most
    return sum(_count(part, escape) for part in _alternatives(text, escape))


def _split(pattern: str, escape: bool) -> list[tuple[str, bool]]:
    """The text outside and inside of the outer braces."""
    parts, depth, start = [], 0, 0
    for place, character in _characters(pattern, escape):
        if character == "{":
            if not depth:
                parts.append((pattern[start:place], False))
                start = place + 1
            depth += 1
        elif character == "}":
            depth -= 1
            if not depth:
                parts.append((pattern[start:place], True))
                start = place + 1
    return parts


def _alternatives(text: str, escape: bool) -> list[str]:
    depth, start, parts = 0, 0, []
    for place, character in _characters(text, escape):
        depth += (character == "{") - (character == "}")
        if character == "," and not depth:
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]]


def _characters(text: str, escape: bool) -> list[tuple[int, str]]:
    """The braces and commas that count, with their places."""
    found, place = [], 0
    while place < len(text):
        if escape and text[place] == "\\":
            place += 1
        elif text[place] in "{},":
            found.append((place, text[place]))
        place += 1
    return found
