"""The paired t-test over seeds. p and quantiles of Student's t distribution, for whole degrees of freedom, in closed form."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Paired(NamedTuple):
    """Differences of n pairs: their mean and standard deviation, t, its two-sided p, and the interval of the mean.

    With one pair only the mean is a number; equal differences have p = 0, or 1 if they are 0.
    """

    n: int
    mean: float
    std: float
    t: float
    p: float
    low: float
    high: float


def paired(base: Sequence[float], variant: Sequence[float], confidence: float = 0.95) -> Paired:
    """The paired t-test of variant - base."""
    differences = [b - a for a, b in zip(base, variant, strict=True)]
    n, mean, nan = len(differences), statistics.fmean(differences), math.nan
    if n < 2:
        return Paired(n, mean, nan, nan, nan, nan, nan)
    std = statistics.stdev(differences)
    error = std / math.sqrt(n)
    t = mean / error if error else math.copysign(math.inf, mean) if mean else 0.0
    half = quantile(1 - confidence, n - 1) * error
    return Paired(n, mean, std, t, p_value(t, n - 1), mean - half, mean + half)


def p_value(t: float, freedom: int) -> float:
    """The probability of |T| >= |t| for Student's t with `freedom` degrees of freedom.

    Abramowitz and Stegun, 26.7.3 and 26.7.4: finite sums in the angle atan(t / sqrt(freedom)).
    """
    angle = math.atan(abs(t) / math.sqrt(freedom))
    cosine = math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return max(0.0, 1 - inside)


def quantile(p: float, freedom: int) -> float:
    """The t with this two-sided p, by bisection."""
    low, high = 0.0, 1.0
    while p_value(high, freedom) > p:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(middle, freedom) > p else (low, middle)
    return high
