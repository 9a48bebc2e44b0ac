"""Searches the largest batch that fits. Peaks are nearly affine in the batch size, so that few are needed."""

from __future__ import annotations

from collections.abc import Callable


def largest(peak: Callable[[int], int], limit: int, *, start: int = 8, most: int = 1 << 24) -> tuple[int, dict[int, int]]:
    """The largest x with peak(x) <= limit, or 0, and all computed peaks, which include that of x + 1 (unless x is `most`).

    Each guess is where the line through the two nearest points crosses the limit; peak should not decrease much with x.
    """
    seen: dict[int, int] = {}

    def fits(x: int) -> bool:
        if x not in seen:
            seen[x] = peak(x)
        return seen[x] <= limit

    low, high = 0, most + 1  # the largest x that fits, and the smallest that does not
    guess = min(start, most)
    while high - low > 1:
        if fits(guess):
            low = max(low, guess)
        else:
            high = min(high, guess)
        guess = min(max(_crossing(seen, low, high, limit), low + 1), high - 1)
    return low, seen


def _crossing(seen: dict[int, int], low: int, high: int, limit: int) -> int:
    """Where the line through the points around the answer crosses the limit; with a single point, twice or half of it."""
    if low in seen and high in seen:
        a, b = low, high
    elif len(seen) > 1 and (low in seen or high in seen):
        b = low if low in seen else high
        a = min((x for x in seen if x != b), key=lambda x: abs(x - b))
    else:
        return 2 * low if low in seen else high // 2
    slope = (seen[b] - seen[a]) / (b - a)
    if slope <= 0:
        return 2 * low if high not in seen else (low + high) // 2
    return int(a + (limit - seen[a]) / slope)
