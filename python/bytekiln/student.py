"""Student's t and the tests that rest on it: is a difference more than chance?

In: samples of numbers. Out: probabilities, quantiles, intervals. Called by `report.groups` and `search.rate_fit`. Needs
neither numpy nor torch: samples here are seeds, and there are few of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance


def t_tails(t: float, degrees: float) -> float:
    """P(|T| ≥ |t|) of Student's t, also for degrees of freedom that are no whole number (Welch).

    = I(ν / (ν + t²); ν/2, 1/2), the regularised incomplete beta function (Abramowitz and Stegun 26.7.1).

    >>> round(t_tails(4.302653, 2), 6), round(t_tails(-2.228139, 10), 6), t_tails(0, 3)
    (0.05, 0.05, 1.0)
    """
    if math.isinf(t):
        return 0.0
    return _incomplete_beta(degrees / (degrees + t * t), degrees / 2, 0.5)


def t_quantile(p: float, degrees: float) -> float:
    """The p-quantile, by bisection.

    >>> round(t_quantile(0.975, 2), 4), round(t_quantile(0.05, 3), 4)
    (4.3027, -2.3534)
    """
    if p < 0.5:
        return -t_quantile(1 - p, degrees)
    low, high = 0.0, 1.0
    while 1 - t_tails(high, degrees) / 2 < p and high < 1e12:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if 1 - t_tails(middle, degrees) / 2 < p else (low, middle)
    return (low + high) / 2


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """Regularised, by Lentz's continued fraction (Press et al., Numerical Recipes, 6.4)."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    tiny, c = 1e-300, 1.0
    d = 1 / (_apart(1 - (a + b) * x / (a + 1), tiny))
    total = d
    for m in range(1, 1000):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _apart(1 + term * d, tiny)
            c = _apart(1 + term / c, tiny)
            total *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * total / a


def _apart(x: float, tiny: float) -> float:
    return tiny if abs(x) < tiny else x


@dataclass(frozen=True)
class Difference:
    """Mean of a sample minus that of another."""

    mean: float
    low: float | None
    high: float | None
    """Interval at the confidence asked for; None where the samples do not tell."""
    p: float | None
    """Two-sided; None where there are too few values."""
    how: str
    """paired, welch, or none: too few values."""
    degrees: float = 0.0


def paired(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Difference:
    """a - b by pairs: seeds that both have, so that what a seed does to both of them falls out.

    >>> d = paired([1.0, 2.0, 3.0], [0.9, 1.8, 2.9])
    >>> round(d.mean, 4), round(d.p, 4), d.how
    (0.1333, 0.0572, 'paired')
    """
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean = fmean(differences)
    if len(differences) < 2:
        return Difference(mean, None, None, None, "none")
    error = math.sqrt(variance(differences) / len(differences))
    return _tested(mean, error, len(differences) - 1, confidence, "paired")


def welch(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Difference:
    """mean(a) - mean(b) of independent samples whose spreads may differ (Welch 1947).

    >>> d = welch([5.0, 5.1, 4.9], [5.5, 5.3, 5.4, 5.6])
    >>> round(d.mean, 3), round(d.p, 4), d.how
    (-0.45, 0.0036, 'welch')
    """
    mean = fmean(a) - fmean(b)
    if len(a) < 2 or len(b) < 2:
        return Difference(mean, None, None, None, "none")
    one, other = variance(a) / len(a), variance(b) / len(b)
    error = math.sqrt(one + other)
    if error == 0:
        return _tested(mean, 0.0, len(a) + len(b) - 2, confidence, "welch")
    degrees = (one + other) ** 2 / (one**2 / (len(a) - 1) + other**2 / (len(b) - 1))
    return _tested(mean, error, degrees, confidence, "welch")


def _tested(mean: float, error: float, degrees: float, confidence: float, how: str) -> Difference:
    # Values that repeat exactly: a difference is then certain, and none is none.
    t = mean / error if error else (math.inf if mean else 0.0)
    reach = t_quantile(0.5 + confidence / 2, degrees) * error
    return Difference(mean, mean - reach, mean + reach, t_tails(t, degrees), how, degrees)


def holm(ps: Sequence[float | None], of: int = 0) -> list[float | None]:
    """p-values corrected for how many were looked at (Holm 1979); None stays None and does not count.

    Args:
        ps: of the comparisons that are shown.
        of: out of how many they were chosen, where that is more: each then counts as the least of all of them.

    >>> holm([0.01, 0.04, None, 0.03])
    [0.03, 0.06, None, 0.06]
    """
    known = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    out: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, p * (max(of, len(known)) - rank)))
        out[i] = largest
    return out
