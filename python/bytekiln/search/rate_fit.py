"""Where the loss is least: a parabola in the logarithm of the learning rate, and how sure that is.

In: final losses of full runs at several rates and seeds. Out: a `Fit`. Called by `search` and `transfer`; no torch.

Near its minimum the loss of a run is a parabola in ln(rate). Runs of one seed see the same weights at the start and the
same batches, so that a seed lifts or lowers all of its runs together; the model therefore has a level for each seed:

    loss(rate, seed) = level(seed) + b·x + c·x² + noise,   x = ln(rate / centre)

The optimum is -b / 2c. Its interval is Fieller's (1954): all θ at which the slope b + 2cθ is not distinguishable from
0 by Student's t at the fit's degrees of freedom. Unlike the delta method it is exact for normal noise however few the
runs are, and where the curvature itself could be 0 it has no end: then the whole searched range is given. It knows of
noise only, so that the parabola's own error is added (`RESOLUTION`). A bootstrap over two or three seeds would draw
from two or three values; it is not used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bytekiln.errors import ConfigError
from bytekiln.student import t_quantile

REACH = 2
"""Rates on either side of the best one that the parabola is laid through."""
RESOLUTION = 0.25
"""The parabola is itself only near: losses rise faster above the optimum than below. So much of the mean distance
between the rates is added to either side of the interval (as a root of squares)."""
WORTH = 0.10
"""Losses further above the best (nats a token) are no longer near the minimum, where a parabola holds."""


class Point(NamedTuple):
    """A run at full length."""

    lr: float
    seed: int
    loss: float
    """Best validation loss, nats a token."""


@dataclass(frozen=True)
class Fit:
    """What the losses say about the best learning rate."""

    lr: float
    """The recommended rate: the parabola's minimum, or the best rate that was run where there is none."""
    low: float
    high: float
    """Confidence interval of the optimum; the searched range where the losses do not narrow it."""
    loss: float
    """Predicted loss there, mean over the seeds."""
    kind: str
    """fitted; edge_low, edge_high: the optimum lies at or behind the lowest or the highest rate; not_convex, too_few:
    no parabola, so that the best rate that was run is given."""
    why: str
    """The same in a sentence."""
    confidence: float
    bounded: bool
    """Whether the interval was narrowed on both sides; a flat optimum is not."""
    sigma: float | None
    """Standard deviation of the noise of a run, the seeds' levels taken out."""
    degrees: int
    """Degrees of freedom that sigma and the interval rest on."""
    centre: float
    level: float
    slope: float
    curvature: float
    """The parabola: level + slope·x + curvature·x², x = ln(lr / centre); all 0 but the level where there is none."""
    used: tuple[float, ...]
    """Rates that the parabola was laid through."""
    best: float
    """Of the rates that were run, the one of least mean loss."""
    levels: tuple[tuple[int, float], ...] = ()
    """(seed, its level); `level` is their mean."""

    def at(self, lr: float, seed: int | None = None) -> float:
        """The parabola's loss at a rate: of one seed's runs, or the mean over all."""
        x = math.log(lr / self.centre)
        level = dict(self.levels).get(seed, self.level) if seed is not None else self.level
        return level + self.slope * x + self.curvature * x * x

    def certain(self, difference: float, seeds: int) -> bool | None:
        """Whether two rates differ by more than chance; None: nothing tells of the noise.

        Student's t at the fit's noise and degrees of freedom. What the confidence leaves is shared by the two
        neighbours of a rate, so that one of them is taken for better by chance so often and no more.

        Args:
            difference: of the mean losses over the seeds that both have. seeds: how many those are.
        """
        if self.sigma is None or self.degrees < 1:
            return None
        reach = t_quantile(0.5 + self.confidence / 2, self.degrees) * self.sigma * math.sqrt(2 / seeds)
        return abs(difference) > reach


def fit_rates(
    points: Iterable[Point],
    *,
    confidence: float = 0.95,
    span: tuple[float, float] | None = None,
    reach: int = REACH,
    worth: float = WORTH,
) -> Fit:
    """The best learning rate, judged by losses of full runs.

    Args:
        points: runs; those without a finite loss are left out.
        confidence: of the interval.
        span: the range that was searched, which an open interval is cut to; None: that of the points.
        reach, worth: which rates are near the best one: so many on either side, no loss so far above the best.

    Raises:
        ConfigError: there is no point with a finite loss.
    """
    runs = [p for p in points if math.isfinite(p.loss) and p.lr > 0]
    if not runs:
        raise ConfigError("losses: found none that is finite; expected at least one run that ended well")
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence: found {confidence:g}; expected a number between 0 and 1")
    means = _means(runs)
    rates = sorted(means)
    low, high = span or (rates[0], rates[-1])
    best = min(rates, key=lambda r: means[r])
    near = _near(rates, means, best, reach, worth)
    used = [p for p in runs if p.lr in near]

    def none(kind: str, why: str) -> Fit:
        return Fit(best, low, high, means[best], kind, why, confidence, False, None, 0, best, means[best], 0.0, 0.0,
                   tuple(near), best)  # fmt: skip

    if len(near) < 3:
        edge = _edge(rates, best) if len(rates) > 1 else ""
        if edge:
            return none(edge, _at_the_edge(edge, best))
        return none("too_few", f"{len(near)} rates near the best one; expected 3 for a parabola")
    centre = math.exp(sum(math.log(r) for r in near) / len(near))
    found = _least_squares(used, centre)
    level, b, c = found.level, found.slope, found.curvature
    if c <= 0:
        edge = _edge(rates, best)
        if edge:
            return none(edge, _at_the_edge(edge, best))
        return none("not_convex", f"the losses near {best:.3g} do not rise on both sides; the best rate run is given")
    minimum = -b / (2 * c)
    lower, upper = _fieller(found, confidence)
    spacing = (math.log(max(near)) - math.log(min(near))) / (len(near) - 1)
    lower = minimum - math.hypot(minimum - lower, RESOLUTION * spacing)
    upper = minimum + math.hypot(upper - minimum, RESOLUTION * spacing)
    bounded = math.isfinite(lower) and math.isfinite(upper)
    lr = centre * math.exp(min(max(minimum, -700.0), 700.0))
    ends = [
        max(centre * math.exp(max(lower, -700.0)), min(low, lr)),
        min(centre * math.exp(min(upper, 700.0)), max(high, lr)),
    ]
    if not bounded:
        ends = [low, high]
    edge = _edge(rates, best)
    outside = "edge_low" if lr < rates[0] else "edge_high" if lr > rates[-1] else ""
    kind, why = "fitted", f"minimum of the parabola through {len(near)} rates"
    if outside or (edge and _near_the_end(lr, rates, edge)):
        kind = outside or edge
        why = _at_the_edge(kind, best)
        lr = min(max(lr, rates[0]), rates[-1])
    elif found.sigma is None:
        why += "; one run a rate tells nothing of the noise, so the interval is the range that was searched"
    elif not bounded:
        why += "; its curvature is not distinguishable from 0, so the interval is the range that was searched"
    x = math.log(lr / centre)
    predicted = level + b * x + c * x * x
    return Fit(lr, ends[0], ends[1], predicted, kind, why, confidence, bounded, found.sigma, found.degrees, centre,
               level, b, c, tuple(near), best, found.levels)  # fmt: skip


def _means(runs: Sequence[Point]) -> dict[float, float]:
    """Mean loss of each rate with the seeds' levels taken out: rates with different seeds are comparable.

    The levels are those of the additive model loss = rate + seed, by least squares; a seed that stands alone tells of
    its rate only.
    """
    rates, seeds = sorted({p.lr for p in runs}), sorted({p.seed for p in runs})
    design = np.zeros((len(runs), len(rates) + len(seeds)))
    for i, p in enumerate(runs):
        design[i, rates.index(p.lr)] = design[i, len(rates) + seeds.index(p.seed)] = 1.0
    found = np.linalg.lstsq(design, np.array([p.loss for p in runs]), rcond=None)[0]
    levels = found[len(rates) :]
    shares = [sum(p.seed == s for p in runs) for s in seeds]
    shift = float(np.average(levels, weights=shares))
    return {r: float(found[i]) + shift for i, r in enumerate(rates)}


def _near(rates: list[float], means: dict[float, float], best: float, reach: int, worth: float) -> list[float]:
    """Rates on either side of the best one that are near the minimum, neighbours first; the neighbours always."""
    i = rates.index(best)
    near = [best]
    for side in (-1, 1):
        for step in range(1, reach + 1):
            j = i + side * step
            if not 0 <= j < len(rates) or (step > 1 and means[rates[j]] > means[best] + worth):
                break
            near.append(rates[j])
    if len(near) < 3:  # best at the end: its curvature may still show from one side
        side = 1 if i < len(rates) / 2 else -1
        for step in range(1, 3):
            j = i + side * step
            if 0 <= j < len(rates) and rates[j] not in near:
                near.append(rates[j])
    return sorted(near)


def _edge(rates: list[float], best: float) -> str:
    return "edge_low" if best == rates[0] else "edge_high" if best == rates[-1] else ""


def _near_the_end(lr: float, rates: list[float], edge: str) -> bool:
    """Whether the minimum lies closer to the end of the range than to the next rate inside."""
    end, inside = (rates[0], rates[1]) if edge == "edge_low" else (rates[-1], rates[-2])
    return abs(math.log(lr / end)) < abs(math.log(lr / inside))


def _at_the_edge(kind: str, best: float) -> str:
    side, more = ("lowest", "lower") if kind == "edge_low" else ("highest", "higher")
    return f"the best rate, {best:.3g}, is the {side} at full length; the range should be widened to {more} rates"


class _Parabola(NamedTuple):
    level: float
    slope: float
    curvature: float
    sigma: float | None
    degrees: int
    levels: tuple[tuple[int, float], ...]
    covariance: NDArray[np.float64]
    """Of (slope, curvature), for noise of variance 1."""


def _least_squares(runs: Sequence[Point], centre: float) -> _Parabola:
    seeds = sorted({p.seed for p in runs})
    x = np.log(np.array([p.lr for p in runs]) / centre)
    design = np.zeros((len(runs), len(seeds) + 2))
    for i, p in enumerate(runs):
        design[i, seeds.index(p.seed)] = 1.0
    design[:, -2], design[:, -1] = x, x * x
    loss = np.array([p.loss for p in runs])
    found, _, rank, _ = np.linalg.lstsq(design, loss, rcond=None)
    degrees = len(runs) - int(rank)
    rest = loss - design @ found
    sigma = math.sqrt(float(rest @ rest) / degrees) if degrees > 0 else None
    inverse = np.asarray(np.linalg.pinv(design.T @ design), dtype=np.float64)
    counts = [sum(p.seed == s for p in runs) for s in seeds]
    level = float(np.average(found[:-2], weights=counts))
    levels = tuple((s, float(v)) for s, v in zip(seeds, found[:-2], strict=True))
    return _Parabola(level, float(found[-2]), float(found[-1]), sigma, degrees, levels, inverse[-2:, -2:])


def _fieller(p: _Parabola, confidence: float) -> tuple[float, float]:
    """The interval of -b / 2c; infinite where the curvature may be 0, or nothing tells of the noise."""
    if p.sigma is None:
        return -math.inf, math.inf
    t = t_quantile(0.5 + confidence / 2, p.degrees)
    v = t * t * p.sigma * p.sigma * p.covariance
    # (b + 2cθ)² ≤ v_bb + 4θ·v_bc + 4θ²·v_cc, a quadratic in θ
    second = 4 * (p.curvature**2 - float(v[1, 1]))
    first = 4 * (p.slope * p.curvature - float(v[0, 1]))
    none = p.slope**2 - float(v[0, 0])
    if second <= 0:
        return -math.inf, math.inf
    root = math.sqrt(max(first * first - 4 * second * none, 0.0))
    return (-first - root) / (2 * second), (-first + root) / (2 * second)
