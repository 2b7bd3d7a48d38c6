"""Curves with fewer points that look the same: every spike stays.

In: arrays of steps and values. Out: shorter ones. Called by `report.runs`; numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
POINTS = 1200
"""Most points of a training curve; fewer where there are many runs (`points_for`)."""
ALL_POINTS = 160_000
"""Of all training curves of a page together: about 2 MB of text."""


@dataclass(frozen=True)
class Curve:
    """Values by step, finite all of them."""

    x: Floats
    y: Floats

    def __len__(self) -> int:
        """How many points."""
        return len(self.x)


def points_for(runs: int) -> int:
    """How many points a training curve may have on a page of so many runs.

    >>> points_for(1), points_for(200), points_for(10_000)
    (1200, 800, 100)
    """
    return max(100, min(POINTS, ALL_POINTS // max(runs, 1)))


def thinned(x: Floats, y: Floats, points: int) -> Curve:
    """A curve of at most `points` points: of each bucket of neighbours the lowest and the highest, both ends always.

    Values that are not finite are left out. A curve that is short enough stays as it is.
    """
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(y) <= points:
        return Curve(x, y)
    buckets = max(1, (points - 2) // 2)
    edges = np.linspace(0, len(y), buckets + 1).astype(int)
    low = _first_equal(y, np.minimum.reduceat(y, edges[:-1]), edges)
    high = _first_equal(y, np.maximum.reduceat(y, edges[:-1]), edges)
    keep = np.unique(np.concatenate([[0, len(y) - 1], low, high]))
    return Curve(x[keep], y[keep])


def _first_equal(y: Floats, of_bucket: Floats, edges: NDArray[np.int_]) -> NDArray[np.int_]:
    """Index of the first value of each bucket that equals the bucket's."""
    hits = np.flatnonzero(y == np.repeat(of_bucket, np.diff(edges)))
    return hits[np.searchsorted(hits, edges[:-1])]


def smoothed(values: Floats, span: float) -> Floats:
    """Exponential moving average over about `span` values, without the pull towards its start (as in Adam).

    >>> smoothed(np.array([2.0, 2.0, 2.0]), 10).tolist()
    [2.0, 2.0, 2.0]
    """
    if len(values) == 0 or span <= 1:
        return values.copy()
    keep = 1 - 2 / (span + 1)
    out, total, weight = np.empty(len(values)), 0.0, 0.0
    for i, v in enumerate(values.tolist()):
        total, weight = keep * total + v, keep * weight + 1
        out[i] = total / weight
    return out


def averaged(x: Floats, y: Floats, points: int) -> Curve:
    """Means of buckets of neighbours: what a smoothed curve needs, at most `points` of them."""
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(y) <= points:
        return Curve(x, y)
    edges = np.linspace(0, len(y), points + 1).astype(int)
    size = np.diff(edges)
    return Curve(np.add.reduceat(x, edges[:-1]) / size, np.add.reduceat(y, edges[:-1]) / size)


def sampled(x: Floats, y: Floats, points: int) -> Curve:
    """Every so-manieth value, the last one included: for what has no noise, as a learning rate or a clock."""
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(y) <= points:
        return Curve(x, y)
    keep = np.unique(np.linspace(0, len(y) - 1, points).round().astype(int))
    return Curve(x[keep], y[keep])
