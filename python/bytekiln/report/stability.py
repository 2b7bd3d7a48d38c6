"""Whether a run is stable, in numbers: spikes, the largest gradient, where the loss is heading, spread over seeds.

In: arrays of a run's steps, losses and gradient norms. Out: a `Stability`. Called by the report and by experiments.
numpy only.

A **spike** is a stretch of steps whose loss lies more than 3 σ above its trend. The trend goes through the medians of
blocks of steps, short ones at the start, where the loss falls fast; σ is 1.4826 times the median distance from it,
which the spikes themselves do not widen. Of n steps of pure noise 0.00135·n lie that high by chance; `expected_spikes`
says how many that is.

The **end** is a straight line through the last 10 % of the steps (20 at least):

- *still falling*: it falls by more than twice its standard error (which swings widen) and by more than 0.5 % of the
  loss in that time;
- *oscillating*: it rises by as much, or means of tenths of it swing with more than four times the variance that the
  noise of single steps explains, by more than 0.5 % of the loss;
- *converged*: neither.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

import numpy as np
from numpy.typing import NDArray

SPIKE, MAD = 3.0, 1.4826
"""σ above the trend; median distance of a normal distribution to its σ."""
BY_CHANCE = 0.00135
"""Share of a normal distribution above 3 σ."""
LAST, LEAST = 0.1, 20
"""Share of the run that is its end, and of how many steps at least."""
WORTH = 0.005
"""A change of the loss by this share of it, or less, is none."""
SWING = 4.0
"""Variance of means over what single steps explain, above which the loss swings."""

End = Literal["converged", "still falling", "oscillating", "too short to tell"]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Stability:
    """A run's stability in numbers."""

    spikes: int
    """Stretches of steps above 3 σ of the detrended loss."""
    expected_spikes: float
    """How many of them noise alone would make."""
    sigma: float | None
    """Of the detrended loss, nats a token."""
    highest: float | None
    """Of all steps, how many σ above the trend the loss was."""
    highest_step: int | None
    largest_grad_norm: float | None
    """Before clipping."""
    largest_grad_step: int | None
    slope: float | None
    """Over the last 10 %, nats a token per 1,000 steps."""
    slope_error: float | None
    """Its standard error."""
    end: End


def stability(
    steps: Sequence[float] | Floats,
    losses: Sequence[float] | Floats,
    grad_norms: Sequence[float] | Floats | None = None,
    norm_steps: Sequence[float] | Floats | None = None,
) -> Stability:
    """Judge a run by the training losses of its steps.

    Args:
        steps: rising. losses: nats a token, as long; values that are not finite are left out.
        grad_norms: norms of the gradient before clipping; None: not known.
        norm_steps: their steps; None: `steps`.
    """
    x, y = np.asarray(steps, float), np.asarray(losses, float)
    norm, norm_step = _largest(x if norm_steps is None else np.asarray(norm_steps, float), grad_norms)
    known = np.isfinite(y)
    x, y = x[known], y[known]
    if len(y) < LEAST:
        return Stability(0, 0.0, None, None, None, norm, norm_step, None, None, "too short to tell")
    rest = y - trend(x, y)
    sigma = MAD * float(np.median(np.abs(rest)))
    spikes, highest, at = 0, None, None
    if sigma > 0:
        above = rest > SPIKE * sigma
        spikes = int(above[0]) + int(np.count_nonzero(above[1:] & ~above[:-1]))
        top = int(np.argmax(rest))
        highest, at = float(rest[top] / sigma), int(x[top])
    slope, error, end = ending(x, y)
    return Stability(spikes, BY_CHANCE * len(y), sigma, highest, at, norm, norm_step, slope, error, end)


def _largest(x: Floats, norms: Sequence[float] | Floats | None) -> tuple[float | None, int | None]:
    if norms is None:
        return None, None
    n = np.asarray(norms, float)
    if not np.isfinite(n).any():
        return None, None
    i = int(np.nanargmax(np.where(np.isfinite(n), n, np.nan)))
    return float(n[i]), int(x[i])


def trend(x: Floats, y: Floats) -> Floats:
    """The loss without its noise: a line through the medians of blocks of steps.

    Blocks grow from 5 steps to a fiftieth of the run; before the first and behind the last median the line goes on
    straight.
    """
    edges, widest = [0], max(9, len(y) // 50)
    while edges[-1] < len(y):
        edges.append(edges[-1] + int(min(max(5, edges[-1] // 4), widest)))
    edges[-1] = len(y)
    if len(edges) > 2 and edges[-1] - edges[-2] < 5:
        del edges[-2]
    pairs = list(itertools.pairwise(edges))
    at = np.array([x[a:b].mean() for a, b in pairs])
    level = np.array([np.median(y[a:b]) for a, b in pairs])
    if len(at) < 2:
        return np.full(len(y), level[0])
    out: Floats = np.interp(x, at, level)
    for ends, one, other in ((x < at[0], 0, 1), (x > at[-1], -1, -2)):
        slope = (level[one] - level[other]) / (at[one] - at[other])
        out[ends] = level[one] + slope * (x[ends] - at[one])
    return out


def ending(x: Floats, y: Floats) -> tuple[float, float, End]:
    """(slope per 1,000 steps, its standard error, what it means) of the last tenth of at least 20 finite losses."""
    count = max(LEAST, math.ceil(LAST * len(y)))
    x, y = x[-count:], y[-count:]
    centred = x - x.mean()
    spread = float(centred @ centred)
    slope = float(centred @ y) / spread
    rest = y - y.mean() - slope * centred
    noise = float(rest @ rest) / (len(y) - 2)
    error = math.sqrt(noise / spread)
    change, change_error = slope * float(x[-1] - x[0]), error * float(x[-1] - x[0])
    level = abs(float(y.mean()))
    ratio, size = _swings(rest)
    if ratio > SWING:  # single steps are not independent then, and tell less of the slope
        error, change_error = error * math.sqrt(ratio), change_error * math.sqrt(ratio)
    least = max(2 * change_error, WORTH * level)
    end: End = "converged"
    if change < -least:
        end = "still falling"
    elif change > least or (ratio > SWING and size > WORTH * level):
        end = "oscillating"
    return 1000 * slope, 1000 * error, end


def _swings(rest: Floats) -> tuple[float, float]:
    """Of means of tenths: their variance over what the noise of single steps makes of it, and their σ."""
    parts = np.array_split(rest, 10 if len(rest) >= 50 else 5)
    means = np.array([p.mean() for p in parts])
    within = float(np.mean([p.var(ddof=1) for p in parts]))
    between = float(means.var(ddof=1))
    size = len(rest) / len(parts)
    return between * size / max(within, 1e-300), math.sqrt(between)


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and σ over seeds; one seed has no σ.

    >>> spread([3.0, 5.0]), spread([3.0])
    ((4.0, 1.4142135623730951), (3.0, None))
    """
    return fmean(values), stdev(values) if len(values) > 1 else None
