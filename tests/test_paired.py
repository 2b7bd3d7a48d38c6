"""Intervals and paired tests, against counting, against scipy-free definitions, and on planted differences."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bytekiln.errors import MismatchError
from bytekiln.score.paired import accuracy_interval, compare_answers, compare_losses, standard_error


@given(k=st.integers(0, 12), n=st.integers(0, 12))
def test_mcnemars_p_is_the_share_of_outcomes_at_least_as_uneven(k: int, n: int) -> None:
    k = min(k, n)
    pairs = [(True, False)] * k + [(False, True)] * (n - k) + [(True, True)] * 3
    found = compare_answers([a for a, _ in pairs], [b for _, b in pairs])
    as_uneven = sum(math.comb(n, i) for i in range(n + 1) if abs(2 * i - n) >= abs(2 * k - n))
    assert found.p_value == pytest.approx(as_uneven / 2**n)
    assert (found.only_a, found.only_b) == (k, n - k)
    assert found.difference == pytest.approx((2 * k - n) / (n + 3))
    assert found.low <= found.difference <= found.high


def test_the_same_answers_do_not_differ() -> None:
    found = compare_answers([True, False] * 50, [True, False] * 50)
    assert found.difference == 0 and found.p_value == 1 and found.low < 0 < found.high
    assert not found.distinguishable


def test_thousands_of_questions() -> None:
    a = [True] * 3000 + [False] * 2800
    found = compare_answers(a, [not x for x in a])
    z = 200 / math.sqrt(5800)
    assert found.p_value == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.05)


def test_the_intervals_cover_the_truth() -> None:
    """Of accuracies near 0 too, and of differences: 95 % to within sampling error."""
    draw = random.Random(1)
    hits, differ = 0, 0
    for _ in range(400):
        n = 60
        low, high = accuracy_interval(sum(draw.random() < 0.04 for _ in range(n)), n)
        hits += low <= 0.04 <= high
        a = [draw.random() < 0.5 for _ in range(n)]
        b = [x if draw.random() < 0.7 else draw.random() < 0.3 for x in a]  # P(b) = 0.35 + 0.09
        found = compare_answers(a, b)
        differ += found.low <= 0.5 - 0.44 <= found.high
    assert hits >= 372 and differ >= 368


def test_wilson_and_the_harness_error_by_hand() -> None:
    low, high = accuracy_interval(0, 10)
    assert low == 0 and high == pytest.approx(0.27753, abs=1e-4)
    assert accuracy_interval(10, 10) == pytest.approx((1 - high, 1))
    values = [1.0] * 3 + [0.0] * 7
    assert standard_error(3, 10) == pytest.approx(np.std(values, ddof=1) / math.sqrt(10))
    assert standard_error(1, 1) is None


def test_losses_by_all_signs() -> None:
    """With few units every sign can be counted: the draws come near it."""
    d = np.array([0.5, 0.2, -0.1, 0.4, 0.3, 0.6])
    found = compare_losses(d, np.zeros(6), np.ones(6))
    signs = np.array(list(itertools.product([-1, 1], repeat=6)))
    exact = (np.abs(signs @ d) >= abs(d.sum()) - 1e-12).mean()
    assert found.p_value == pytest.approx(exact, abs=0.01)
    assert found.difference == pytest.approx(d.mean()) and found.low < d.mean() < found.high


def test_a_planted_difference_is_found_and_noise_is_not() -> None:
    rng = np.random.default_rng(0)
    weight = rng.integers(50, 500, 200).astype(float)
    base = weight * 1.5 + rng.normal(0, 20, 200)
    better = base - 0.05 * weight + rng.normal(0, 5, 200)
    found = compare_losses(base, better, weight)
    assert found.distinguishable and found.low < 0.05 < found.high and found.n == 200
    noise = compare_losses(base, base + rng.normal(0, 5, 200), weight)
    assert not noise.distinguishable and noise.low < 0 < noise.high
    assert compare_losses(base, better, weight) == found, "seeded"
    assert compare_losses(base, better, weight, seed=1) != found
    same = compare_losses(base, base, weight)
    assert (same.difference, same.p_value, same.low, same.high) == (0, 1, 0, 0)


def test_units_without_text_are_left_out() -> None:
    a, b, w = np.array([1.0, 2.0, 9.0]), np.array([1.0, 1.0, 0.0]), np.array([1.0, 1.0, 0.0])
    assert compare_losses(a, b, w).difference == 0.5
    assert compare_losses(a, b, w).as_json()["interval"][0] <= 0.5


def test_many_units_take_fewer_draws() -> None:
    n = 200_001
    found = compare_losses(np.ones(n), np.zeros(n), np.ones(n))
    assert "1,000 draws" in found.test and found.p_value == pytest.approx(1 / 1001)


def test_what_cannot_be_compared() -> None:
    with pytest.raises(MismatchError, match="found 1 and 2 answers"):
        compare_answers([True], [True, False])
    with pytest.raises(MismatchError, match="found 0 and 0 answers"):
        compare_answers([], [])
    with pytest.raises(MismatchError, match="found 2 and 3 units"):
        compare_losses(np.ones(2), np.ones(3), np.ones(2))
    with pytest.raises(MismatchError, match="found 1 unit of text"):
        compare_losses(np.ones(1), np.ones(1), np.ones(1))
