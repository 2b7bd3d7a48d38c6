"""Loss against learning rate, with the parabola of `search.rate_fit`. In: runs in groups. Out: `RateSeries`. No torch.

Called by `report.data` and `report.pictures`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from bytekiln.report.groups import Group
from bytekiln.report.runs import Run
from bytekiln.search.rate_fit import Fit, Point, fit_rates
from bytekiln.sweep.axes import short

CURVE_POINTS = 60


@dataclass(frozen=True)
class RateSeries:
    """Runs that differ in learning rate and seed only."""

    name: str
    groups: list[int]
    points: list[tuple[float, float, int]]
    """(learning rate, best validation loss, number of the group)."""
    means: list[tuple[float, float]]
    """Of the rates whose runs all ended well: the mean of survivors says nothing of a rate."""
    lost: list[float]
    """Rates of runs that diverged."""
    partial: list[float]
    """Rates of which some runs ended well and others did not; the fit knows none of them."""
    fit: Fit | None
    curve: list[tuple[float, float]]

    @property
    def said(self) -> str:
        """The fit in a sentence."""
        return self._fitted() + self._left_out()

    def _left_out(self) -> str:
        if not self.partial:
            return ""
        rates = ", ".join(_name(lr) for lr in self.partial)
        return f" Left out of the fit, since not every seed ended well: {rates}."

    def _fitted(self) -> str:
        f = self.fit
        if f is None:
            return f"fewer than three learning rates{' whose runs all ended well' if self.partial else ''}: no fit."
        above = [lr for lr in self.lost if lr > f.best]
        if f.kind == "edge_high" and above:
            return (
                f"the best rate, {_name(f.best)}, is the highest that ended well; "
                f"none between it and {_name(min(above))}, which diverged, was run."
            )
        if f.kind != "fitted":
            return f"{f.why}."
        share = f"{100 * f.confidence:.0f} % interval {_name(f.low)} to {_name(f.high)}"
        of = share if f.bounded else "the interval is not bounded by these runs"
        sigma = "" if f.sigma is None else f"; σ of a run {f.sigma:.2g}"
        return f"a parabola in ln(lr) has its minimum at {_name(f.lr)} ({of}), loss {f.loss:.4f}{sigma}."


def _name(lr: float) -> str:
    return short(float(f"{lr:.3g}"))


def rate_series(groups: Sequence[Group]) -> list[RateSeries]:
    """The series of at least two learning rates; empty where the rate does not vary."""
    families: dict[object, list[int]] = {}
    for i, group in enumerate(groups):
        first = group.runs[0]
        others = tuple((k, v) for k, v in group.changes.items() if k not in ("lr", "min_lr"))
        families.setdefault((first.asked.folder if first.asked else None, first.variant, others), []).append(i)
    out = []
    for members in families.values():
        runs = [(i, r, lr) for i in members for r in groups[i].runs if (lr := _rate(r)) is not None]
        if len({lr for _, _, lr in runs}) < 2:
            continue
        good = [(i, r, lr) for i, r, lr in runs if r.counts]
        points = [(lr, float(r.result["best_val_loss"]), i) for i, r, lr in good]
        if not points:
            continue
        broken = {lr for _, r, lr in runs if not r.counts}
        by_rate: dict[float, list[float]] = {}
        for lr, loss, _ in points:
            if lr not in broken:
                by_rate.setdefault(lr, []).append(loss)
        means = [(lr, fmean(by_rate[lr])) for lr in sorted(by_rate)]
        fit = None
        if len(by_rate) >= 3:
            seeds = [r.seed if r.seed is not None else 0 for _, r, _ in good]
            whole = [(p, seed) for p, seed in zip(points, seeds, strict=True) if p[0] not in broken]
            fit = fit_rates([Point(lr, seed, loss) for (lr, loss, _), seed in whole])
        first = groups[members[0]].runs[0]
        name = first.variant or ", ".join(
            f"{k}={short(v)}" for k, v in groups[members[0]].changes.items() if k not in ("lr", "min_lr")
        )
        lost = sorted({lr for _, r, lr in runs if r.status == "diverged"})
        partial = sorted(broken & {lr for lr, _, _ in points})
        out.append(RateSeries(name, members, points, means, lost, partial, fit, _curve(fit)))
    return out


def _rate(run: Run) -> float | None:
    lr = run.config.get("lr", run.result.get("lr"))
    return float(lr) if isinstance(lr, int | float) and not isinstance(lr, bool) and lr > 0 else None


def _curve(fit: Fit | None) -> list[tuple[float, float]]:
    if fit is None or fit.curvature <= 0:
        return []
    low, high = min(*fit.used, fit.low, fit.lr), max(*fit.used, fit.high, fit.lr)
    if not fit.bounded:
        low, high = min(fit.used), max(fit.used)
    return [(float(x), fit.at(float(x))) for x in np.geomspace(low, high, CURVE_POINTS)]
