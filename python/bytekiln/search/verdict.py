"""Which rate a search recommends in the end: the confirmed one is held against its neighbours at full length.

In: runs that ended well, as points, and the fit that recommended. Out: a `Verdict`. Called by `search.stages`; pure
functions, no torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from bytekiln.search.rate_fit import Fit, Point
from bytekiln.sweep.axes import short


@dataclasses.dataclass
class Verdict:
    """What follows from the runs that confirm."""

    recommended: float
    confirmed_loss: float
    """Mean over the seeds of the recommended rate."""
    predicted_loss: float | None
    """By the fit, for the seeds of the rate that it recommended."""
    neighbours: list[tuple[float, float]]
    """(rate, loss) beside the fit's rate: its own and the mean difference over the seeds of both."""
    confirmed: bool
    notes: list[str]


def judged(lr: float, points: Sequence[Point], fit: Fit) -> Verdict:
    """Hold the rate that the fit recommends against those beside it; the better one by more than chance wins.

    Args:
        lr: the fit's rate, which has ended well.
        points: all runs at full length that ended well.
        fit: that of the runs before the confirmation.
    """
    mine = [p for p in points if p.lr == lr]
    loss = mean(p.loss for p in mine)
    predicted = mean(fit.at(lr, p.seed) for p in mine) if fit.curvature > 0 else None
    found = Verdict(lr, loss, predicted, [], True, [])
    lower: list[tuple[float, float, int]] = []
    for other in beside(lr, points):
        more, common = _difference(other, lr, points, fit)
        found.neighbours.append((other, loss + more))
        if common and more < 0:
            lower.append((more, other, common))
    _hold_against(found, lower, points, fit)
    if found.recommended != lr:
        found.confirmed_loss = mean(p.loss for p in points if p.lr == found.recommended)
    if len(found.neighbours) < 2:
        found.confirmed = False
        found.notes.append(f"{short(found.recommended)} has no neighbour on one side that ended well")
    return found


def _hold_against(found: Verdict, lower: Iterable[tuple[float, float, int]], points: Sequence[Point], fit: Fit) -> None:
    """Recommend the best of the neighbours that are better by more than chance.

    Args:
        found: with the fit's rate. lower: (mean difference, rate, seeds that both have) of neighbours of lower loss.
        points, fit: as `judged`.
    """
    lr = found.recommended
    for less, other, common in sorted(lower):
        by = f"by {-less:.4f} over {common} seed{'s' * (common > 1)}"
        certain = fit.certain(less, common)
        if certain:
            found.notes.append(
                f"{short(other)} was better at full length, {by}, more than chance; it is recommended instead of "
                f"{short(lr)}"
            )
            found.recommended, found.confirmed = other, False
            return
        if certain is None:
            runs = "one seed" if len({p.seed for p in points}) == 1 else "the runs"
            found.notes.append(
                f"{short(other)} was lower at full length, {by}; {runs} cannot tell that from chance, and "
                f"{short(lr)} stays recommended"
            )
            found.confirmed = False


def beside(lr: float, points: Iterable[Point]) -> list[float]:
    """The nearest rates on either side."""
    others = sorted({p.lr for p in points if p.lr != lr})
    return [*[o for o in others if o < lr][-1:], *[o for o in others if o > lr][:1]]


def _difference(other: float, lr: float, points: Sequence[Point], fit: Fit) -> tuple[float, int]:
    """(mean loss of `other` above that of `lr`, by the seeds that both have; how many those are)."""
    mine, theirs = ({p.seed: p.loss for p in points if p.lr == rate} for rate in (lr, other))
    common = [theirs[seed] - mine[seed] for seed in mine if seed in theirs]
    return (mean(common), len(common)) if common else (fit.at(other) - fit.at(lr), 0)


def mean(values: Iterable[float]) -> float:
    """Of at least one.

    >>> mean([1.0, 2.0])
    1.5
    """
    found = list(values)
    return math.fsum(found) / len(found)
