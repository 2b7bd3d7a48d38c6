"""Stability in numbers: planted spikes, ends and seeds."""

from __future__ import annotations

import numpy as np
import pytest

from bytekiln.report.stability import Stability, spread, stability


def losses(steps: int, noise: float = 0.03, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """A loss as models have it: a power law, and noise of batches."""
    x = np.arange(1, steps + 1, dtype=float)
    return x, 2.0 + 4 * (1 + x / 10) ** -0.5 + np.random.default_rng(seed).normal(0, noise, steps)


def test_planted_spikes_are_counted() -> None:
    x, y = losses(4000)
    quiet = stability(x, y)
    for at, height in ((500, 0.5), (501, 0.6), (502, 0.5), (2000, 1.0), (3990, 0.4)):
        y[at] += height
    judged = stability(x, y, np.where(x == 2001, 55.0, 1.0))
    assert judged.spikes == quiet.spikes + 3, "three stretches, the first of them three steps long"
    assert judged.highest_step == 2001 and judged.highest is not None and judged.highest > 20
    assert (judged.largest_grad_norm, judged.largest_grad_step) == (55.0, 2001)
    assert judged.sigma == pytest.approx(0.03, rel=0.1), "spikes do not widen it"


@pytest.mark.parametrize("steps", [60, 300, 5000, 40_000])
def test_noise_alone_makes_about_as_many_as_expected(steps: int) -> None:
    found = [stability(*losses(steps, seed=s)) for s in range(5)]
    mean = sum(f.spikes for f in found) / 5
    assert mean <= 2 * found[0].expected_spikes + 2.5
    assert found[0].expected_spikes == pytest.approx(0.00135 * steps)


def test_the_three_ends() -> None:
    x = np.arange(1, 1001, dtype=float)
    noise = np.random.default_rng(0).normal(0, 0.02, 1000)
    flat = 3 + np.maximum(0, 1 - x / 500)
    assert stability(x, flat + noise).end == "converged"
    falling = stability(x, 5 - x / 500 + noise)
    assert falling.end == "still falling"
    assert falling.slope == pytest.approx(-2, rel=0.05), "nats a token per 1,000 steps"
    assert falling.slope_error is not None and falling.slope_error < 0.2
    assert stability(x, flat + noise + np.where(x > 900, (x - 900) / 200, 0)).end == "oscillating", "it rises"
    assert stability(x, flat + noise + 0.1 * np.sin(x / 8)).end == "oscillating"


def test_what_cannot_be_told() -> None:
    nothing = Stability(0, 0.0, None, None, None, None, None, None, None, "too short to tell")
    assert stability([], []) == nothing
    assert stability([1, 2], [np.nan, np.inf], [np.nan, np.inf]) == nothing
    assert stability(range(19), [3.0] * 19).end == "too short to tell"
    still = stability(range(1, 31), [3.0] * 30)
    assert (still.spikes, still.sigma, still.end) == (0, 0.0, "converged")


def test_seeds() -> None:
    assert spread([3.0]) == (3.0, None)
    mean, sigma = spread([2.9, 3.0, 3.1])
    assert (mean, sigma) == (pytest.approx(3.0), pytest.approx(0.1))
