"""Tests of significance against tables, and how often they err on pure noise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bytekiln.student import holm, paired, t_quantile, t_tails, welch


@pytest.mark.parametrize(
    ("p", "degrees", "quantile"),
    # NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2
    [
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.95, 5, 2.015),
        (0.995, 10, 3.169),
        (0.999, 30, 3.385),
        (0.9, 100, 1.290),
    ],
)
def test_quantiles_of_the_tables(p: float, degrees: int, quantile: float) -> None:
    assert t_quantile(p, degrees) == pytest.approx(quantile, abs=6e-4)
    assert t_quantile(1 - p, degrees) == pytest.approx(-quantile, abs=6e-4)
    assert t_tails(quantile, degrees) == pytest.approx(2 * (1 - p), rel=2e-3)


def test_one_degree_is_the_cauchy_distribution_and_many_the_normal_one() -> None:
    for t in (0.1, 1.0, 7.0, 500.0):
        assert t_tails(t, 1) == pytest.approx(1 - 2 * math.atan(t) / math.pi, rel=1e-9)
    assert t_tails(1.959964, 1e7) == pytest.approx(0.05, rel=1e-5)
    assert t_tails(math.inf, 3) == 0
    assert t_tails(2.0, 2) > t_tails(2.0, 2.5) > t_tails(2.0, 3), "Welch's degrees are no whole numbers"


def test_known_differences() -> None:
    # Student's own data (1908, after Cushny and Peebles): hours of sleep gained under two drugs
    one = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    other = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    by_pairs = paired(one, other)
    assert (by_pairs.mean, by_pairs.p) == (pytest.approx(-1.58), pytest.approx(0.002833, rel=1e-3))
    assert (by_pairs.low, by_pairs.high) == (pytest.approx(-2.4599, abs=1e-4), pytest.approx(-0.7001, abs=1e-4))
    apart = welch(one, other)
    assert (apart.p, apart.degrees) == (pytest.approx(0.07939, rel=1e-3), pytest.approx(17.776, rel=1e-4))


def test_too_few_and_equal_values() -> None:
    assert paired([1.0], [2.0]).p is None and welch([1.0], [2.0, 3.0]).p is None
    assert paired([1.0, 2.0], [1.0, 2.0]).p == 1
    assert welch([1.0, 1.0], [2.0, 2.0]).p == 0
    with pytest.raises(ValueError, match="zip"):
        paired([1.0], [1.0, 2.0])


def test_false_alarms_are_as_rare_as_promised() -> None:
    rng = np.random.default_rng(0)
    alarms = {"paired": 0, "welch": 0, "holm": 0}
    for _ in range(300):
        runs = rng.normal(0, 1, (5, 3)).tolist()
        alarms["paired"] += (paired(runs[0], runs[1]).p or 0) < 0.05
        alarms["welch"] += (welch(runs[0], runs[1]).p or 0) < 0.05
        alarms["holm"] += any((p or 0) < 0.05 for p in holm([welch(r, runs[0]).p for r in runs[1:]]))
    assert 6 <= alarms["paired"] <= 26
    assert 2 <= alarms["welch"] <= 22, "Welch's test errs to the safe side"
    assert alarms["holm"] <= 26, "of four comparisons together"


def test_holm() -> None:
    assert holm([0.01, 0.02, 0.03]) == [0.03, 0.04, 0.04]
    assert holm([None, 0.5, None]) == [None, 0.5, None]
    assert holm([]) == []
