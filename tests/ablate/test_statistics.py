"""Student's t and the paired t-test against values of scipy.stats 1.15 and of tables."""

import math

import pytest

from simplclip.ablate.statistics import p_value, paired, quantile


@pytest.mark.parametrize(
    ("freedom", "t"),
    [
        (1, 12.706204736174694),
        (2, 4.302652729749462),
        (3, 3.1824463052837078),
        (4, 2.7764451051977934),
        (5, 2.5705818356363146),
        (9, 2.262157162798205),
        (10, 2.228138851986274),
        (30, 2.0422724563012378),
    ],
)
def test_quantile_of_95_percent(freedom, t):
    assert quantile(0.05, freedom) == pytest.approx(t, abs=1e-6)
    assert p_value(t, freedom) == p_value(-t, freedom) == pytest.approx(0.05, abs=1e-9)


def density(x, n):
    return (
        math.exp(math.lgamma((n + 1) / 2) - math.lgamma(n / 2)) / math.sqrt(n * math.pi) * (1 + x * x / n) ** (-(n + 1) / 2)
    )


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 8, 25])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 2.5, 6.0])
def test_p_is_the_integral_of_the_density(freedom, t):
    steps = 2000  # Simpson's rule from 0 to t
    weights = [1, *([4, 2] * (steps // 2 - 1)), 4, 1]
    inside = t / steps / 3 * sum(w * density(i * t / steps, freedom) for i, w in enumerate(weights))
    assert p_value(t, freedom) == pytest.approx(1 - 2 * inside, abs=1e-9)


def test_paired_t_test():
    base, variant = [20.1, 21.4, 19.6, 22.0], [21.0, 21.9, 20.9, 22.2]
    test = paired(base, variant)  # scipy.stats.ttest_rel(variant, base)
    assert test.n == 4
    assert test.mean == pytest.approx(0.725)
    assert test.std == pytest.approx(0.478713553878169)
    assert test.t == pytest.approx(3.028951213629144, abs=1e-6)
    assert test.p == pytest.approx(0.05635778865809602, abs=1e-6)
    assert (test.low, test.high) == pytest.approx((-0.036740090414405735, 1.4867400904144032), abs=1e-6)


def test_few_or_equal_pairs():
    one = paired([1.0], [3.0])
    assert (one.n, one.mean) == (1, 2.0)
    assert all(math.isnan(value) for value in one[2:])
    same = paired([1.0, 2.0], [1.0, 2.0])
    assert (same.t, same.p, same.low, same.high) == (0.0, 1.0, 0.0, 0.0)
    shifted = paired([1.0, 2.0, 3.0], [2.0, 3.0, 4.0])
    assert (shifted.t, shifted.p, shifted.low, shifted.high) == (math.inf, 0.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="zip"):
        paired([1.0], [1.0, 2.0])
