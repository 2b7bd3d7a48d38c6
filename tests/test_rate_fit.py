"""The parabola in ln(rate): planted optima, the coverage of the interval, edges, flat and concave losses."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bytekiln.errors import ConfigError
from bytekiln.search.rate_fit import Point, fit_rates


def planted(
    optimum: float,
    *,
    rates: int = 5,
    seeds: int = 2,
    noise: float = 0.0,
    level: float = 0.0,
    curvature: float = 0.03,
    rng: np.random.Generator | None = None,
) -> list[Point]:
    """Runs on a grid of factor 2 round 1e-2, whose losses are a parabola with its minimum at `optimum`."""
    rng = rng or np.random.default_rng(0)
    points = []
    for seed in range(seeds):
        lift = rng.normal(0, level) if level else 0.0
        for i in range(rates):
            lr = 1e-2 * 2.0 ** (i - (rates - 1) / 2)
            x = math.log(lr / optimum)
            points.append(Point(lr, seed, 2.0 + lift + curvature * x * x + (rng.normal(0, noise) if noise else 0.0)))
    return points


def test_a_parabola_without_noise_is_found_exactly() -> None:
    fit = fit_rates(planted(0.013))
    assert fit.kind == "fitted" and fit.bounded
    assert fit.lr == pytest.approx(0.013, rel=1e-6)
    assert fit.loss == pytest.approx(2.0) and fit.curvature == pytest.approx(0.03)
    assert fit.low < 0.013 < fit.high < 0.013 * 2**0.5, "the parabola's own error remains"
    assert fit.at(0.026) == pytest.approx(2.0 + 0.03 * math.log(2) ** 2)


def test_what_a_seed_does_to_all_of_its_runs_falls_out() -> None:
    runs = planted(0.013, seeds=3, level=0.5)
    fit = fit_rates(runs)
    assert fit.lr == pytest.approx(0.013, rel=1e-6)
    assert fit.sigma == pytest.approx(0, abs=1e-9)
    for p in runs:
        assert fit.at(p.lr, p.seed) == pytest.approx(p.loss)
    # An unlucky seed that was run at the best rates only does not make them look bad.
    lopsided = [
        *planted(0.01, seeds=1),
        Point(1e-2, 7, 3.0),
        Point(2e-2, 7, 3.0 + 0.03 * math.log(2) ** 2),
    ]
    assert fit_rates(lopsided).lr == pytest.approx(0.01, rel=1e-6)
    assert fit_rates(lopsided).best == 1e-2


@pytest.mark.parametrize(
    ("rates", "seeds", "noise", "curvature"),
    [(3, 2, 0.01, 0.03), (3, 3, 0.005, 0.03), (5, 2, 0.01, 0.03), (5, 3, 0.01, 0.06), (7, 2, 0.01, 0.002)],
)
def test_the_interval_covers_the_optimum_as_often_as_it_says(
    rates: int, seeds: int, noise: float, curvature: float
) -> None:
    rng, n, covered = np.random.default_rng(rates * 10 + seeds), 200, 0
    for _ in range(n):
        optimum = 1e-2 * math.exp(rng.uniform(-0.6, 0.6))
        runs = planted(optimum, rates=rates, seeds=seeds, noise=noise, level=0.02, curvature=curvature, rng=rng)
        fit = fit_rates(runs)
        covered += fit.low <= optimum <= fit.high
    assert covered / n >= 0.90, "nominal 95 %"


def test_more_noise_makes_a_wider_interval() -> None:
    widths = []
    for noise in (0.002, 0.01, 0.015):
        rng = np.random.default_rng(3)
        fits = [fit_rates(planted(1e-2, rates=7, seeds=3, noise=noise, rng=rng)) for _ in range(40)]
        widths.append(float(np.median([math.log(f.high / f.low) for f in fits])))
    assert widths == sorted(widths) and widths[-1] > 1.3 * widths[0]


def test_a_flat_optimum_has_the_whole_range_as_its_interval() -> None:
    rng, whole = np.random.default_rng(1), 0
    for _ in range(50):
        fit = fit_rates(planted(1e-2, curvature=0.0, noise=0.01, rng=rng), span=(1e-3, 1e-1))
        whole += (fit.low, fit.high) == (1e-3, 1e-1) and not fit.bounded
    assert whole >= 45


@pytest.mark.parametrize(("optimum", "kind", "side"), [(1e-4, "edge_low", "lower"), (1.0, "edge_high", "higher")])
def test_an_optimum_at_the_edge_asks_for_more_rates(optimum: float, kind: str, side: str) -> None:
    fit = fit_rates(planted(optimum, noise=0.001))
    assert fit.kind == kind and f"widened to {side} rates" in fit.why
    assert 2.5e-3 <= fit.lr <= 4e-2, "no rate is recommended where nothing was run"


def test_losses_that_do_not_rise_on_both_sides_give_the_best_rate_that_was_run() -> None:
    losses = zip((2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2), (2.01, 2.05, 2.0, 2.05, 2.01), strict=True)
    fit = fit_rates([Point(lr, 0, loss) for lr, loss in losses])
    assert fit.kind == "not_convex" and "do not rise on both sides" in fit.why
    assert fit.lr == fit.best == 1e-2 and fit.loss == pytest.approx(2.0)
    assert (fit.low, fit.high) == (2.5e-3, 4e-2) and not fit.bounded


def test_two_rates_make_no_parabola() -> None:
    fit = fit_rates([Point(1e-3, 0, 2.0), Point(2e-3, 0, 1.9)])
    assert fit.kind == "edge_high" and fit.lr == 2e-3 and not fit.bounded
    fit = fit_rates([Point(1e-3, 0, 2.0)])
    assert fit.kind == "too_few" and fit.lr == 1e-3 and fit.sigma is None


def test_one_seed_tells_nothing_of_the_noise() -> None:
    fit = fit_rates(planted(1e-2, rates=3, seeds=1))
    assert fit.kind == "fitted" and fit.degrees == 0 and fit.sigma is None and not fit.bounded
    assert "one run a rate" in fit.why and (fit.low, fit.high) == (5e-3, 2e-2)


def test_losses_that_are_not_finite_are_left_out() -> None:
    runs = [*planted(1e-2), Point(1.0, 0, math.inf), Point(2.0, 0, math.nan)]
    assert fit_rates(runs) == fit_rates(planted(1e-2))
    with pytest.raises(ConfigError, match="none that is finite"):
        fit_rates([Point(1e-2, 0, math.nan)])
    with pytest.raises(ConfigError, match="confidence: found 1"):
        fit_rates(planted(1e-2), confidence=1.0)


def test_rates_far_above_the_best_loss_do_not_bend_the_parabola() -> None:
    near = planted(1e-2, rates=5, curvature=0.03)
    steep = [Point(lr, s, loss + (5.0 if lr > 3e-2 else 0.0)) for lr, s, loss in near]
    fit = fit_rates(steep)
    assert max(fit.used) < 3e-2 and fit.lr == pytest.approx(1e-2, rel=1e-6)
