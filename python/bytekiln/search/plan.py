"""A search for a learning rate as data: its plan, what it asks of whoever trains, and what it is told.

In: values. Out: `Plan`, `Request`, `Seen`, and the protocols of a `Runner` and a `RangeTester`. Called by `search` and
everything round it; imports no torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from bytekiln.errors import ConfigError
from bytekiln.search.rate_fit import Fit, Point, fit_rates
from bytekiln.sweep.axes import short

STAGES = ("range_test", "coarse", "seeds", "fit", "confirm")
ENDED_WELL = ("completed", "early_stopped")
LOST = ("diverged", "failed")
"""A rate with a run that ended so is never recommended."""
FEWEST_STEPS = 10
"""Of a range test: with fewer there is no slope to see."""
GRID_POINTS, GRID_SEEDS = 13, 3
"""The full grid that the cost is compared with."""
FIRST_RUNGS = (1 / 12, 1 / 4)
"""Shares of a run after which rates are given up. On small models the order of the rates stays from there on."""
SAME = 0.05
"""Rates closer than this, as ln of their ratio, are one."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What decides a search, beside the runs themselves."""

    max_steps: int
    """Optimizer steps of a full run."""
    seeds: tuple[int, ...] = (42, 43)
    """The first one judges the coarse grid; all judge the best rate and its neighbours."""
    points: int = 7
    """Rates of the coarse grid."""
    factor: float = 2.0
    """Between two of them."""
    rungs: tuple[int, ...] = ()
    """Steps after which rates are given up; each a multiple of the interval between evaluations."""
    keep: tuple[int, ...] = (4, 3)
    """How many go on behind each rung."""
    centre: float = 0.0
    """Middle of the coarse grid; 0: the range test's suggestion."""
    low: float = 1e-6
    high: float = 10.0
    """Range of the range test, and the end of all widening."""
    range_steps: int = 0
    """Steps of the range test; 0: none, where a centre is given."""
    widenings: int = 4
    """How often the grid may grow at an end."""
    budget: float = 0.0
    """Steps that the search may take in all; what does not fit is left out, and said. 0: a fifth of the full grid's."""
    confidence: float = 0.95

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        checks = [
            (self.points >= 3, f"points: found {self.points}; expected at least 3"),
            (self.factor > 1, f"factor: found {self.factor:g}; expected more than 1"),
            (len(self.seeds) >= 1 and len(set(self.seeds)) == len(self.seeds), "seeds: expected different ones"),
            (len(self.keep) >= len(self.rungs), f"keep: found {len(self.keep)} for {len(self.rungs)} rungs"),
            (
                all(k >= 3 for k in self.keep),
                f"keep: found {self.keep}; expected at least 3, a rate and its neighbours",
            ),
            (list(self.rungs) == sorted(set(self.rungs)), f"rungs: found {self.rungs}; expected rising steps"),
            (0 < self.low < self.high, f"range: found {self.low:g} to {self.high:g}; expected rising rates above 0"),
            (self.centre > 0 or self.range_steps > 0, "centre: found neither one nor a range test; expected one"),
            (
                self.range_steps == 0 or self.range_steps >= FEWEST_STEPS,
                f"range_steps: found {self.range_steps}; expected at least {FEWEST_STEPS}",
            ),
            (all(0 < r < self.max_steps for r in self.rungs), f"rungs: found {self.rungs}; expected below max_steps"),
        ]
        for good, message in checks:
            if not good:
                raise ConfigError(message)
        inside = len(self.grid(self.centre)) if self.low <= self.centre <= self.high else 0
        if self.centre and inside < 3:
            raise ConfigError(
                f"centre: found {self.centre:g}, round which {inside or 'no'} rates of the grid lie within "
                f"{self.low:g} to {self.high:g}; expected at least 3 (--range LOW HIGH is the end of all rates)"
            )
        if self.limit < self.least_steps:
            least = math.ceil(100 * self.least_steps / self.max_steps) / 100
            raise ConfigError(
                f"budget: found {self.limit / self.max_steps:.4g} full runs; expected at least {least:g}, what the "
                "range test, the coarse grid and the confirmation take (--budget N)"
            )

    @property
    def grid_steps(self) -> int:
        """Steps of the full grid."""
        return GRID_POINTS * GRID_SEEDS * self.max_steps

    @property
    def limit(self) -> float:
        """Steps that the search may take."""
        return self.budget or self.grid_steps / 5

    @property
    def stops(self) -> list[tuple[int, int]]:
        """(step, how many rates go on behind it) of the coarse grid; the last is the end, behind which none does."""
        return [*zip(self.rungs, self.keep, strict=False), (self.max_steps, 0)]

    @property
    def least_steps(self) -> int:
        """Steps without which there is no search: range test, coarse grid, and one run that confirms."""
        return self.range_steps + self.coarse_steps(self.points) + self.max_steps

    def coarse_steps(self, alive: int, begun: int = 0) -> int:
        """Steps that so many rates, all of which have come to the stop before `stops[begun]`, still take to the end."""
        total, before = 0, self.stops[begun - 1][0] if begun else 0
        for stop, keep in self.stops[begun:]:
            total, before, alive = total + alive * (stop - before), stop, min(keep, alive)
        return total

    def grid(self, centre: float) -> list[float]:
        """Rates of the coarse grid round a centre, rising; those outside `low` to `high` are left out.

        At least one, also where the range test suggests a centre outside.
        """
        centre, half = min(max(centre, self.low), self.high), (self.points - 1) / 2
        rates = [rounded(centre * self.factor ** (i - half)) for i in range(self.points)]
        return [lr for lr in rates if self.low <= lr <= self.high] or [centre]


class Notes(list[str]):
    """What deserves attention, a sentence each."""

    def __init__(self, say: Callable[[str], object]) -> None:
        """`say` is told each once."""
        super().__init__()
        self._say, self._now = say, dict[str, Callable[[], str]]()

    def add(self, text: str, now: Callable[[], str] | None = None) -> None:
        """`now`: what it would say later on, where that can change; empty: it no longer holds."""
        if text and text not in self:
            self.append(text)
            self._say(text)
            self._now |= {text: now} if now else {}

    def settle(self) -> None:
        """Drop what no longer holds, as of a repeat that was run after all."""
        told = [self._now[n]() if n in self._now else n for n in self]
        self[:] = [*dict.fromkeys(n for n in told if n)]


@dataclasses.dataclass(frozen=True)
class Request:
    """A run that is wanted, up to a step."""

    stage: str
    lr: float
    seed: int
    until: int


@dataclasses.dataclass(frozen=True)
class Seen:
    """What is known of a run."""

    stage: str
    lr: float
    seed: int
    status: str
    """As in a results file; interrupted, while it waits at a rung."""
    steps: int
    curve: tuple[tuple[int, float], ...] = ()
    """(step, validation loss), without that before the first step."""
    why: str = ""
    name: str = ""
    """Of the run in its sweep."""
    given_up: str = ""
    """Why the search gave it up; empty: it did not."""

    @property
    def best(self) -> tuple[float, int] | None:
        """(best validation loss, its step)."""
        return min(((loss, step) for step, loss in self.curve if math.isfinite(loss)), default=None)

    def loss_at(self, step: int) -> float:
        """Best validation loss up to a step; infinite for a run that cannot win, has not come so far, or has none."""
        if self.status in ("diverged", "failed") or (self.status == "interrupted" and self.steps < step):
            return math.inf
        return min((loss for s, loss in self.curve if s <= step and math.isfinite(loss)), default=math.inf)

    def as_of(self, step: int) -> Seen:
        """The run as it stood at a step that it has passed.

        A search that goes on decides as it did the first time: what it trained later on has not happened yet.
        """
        if self.steps <= step:
            return self
        curve = tuple((s, loss) for s, loss in self.curve if s <= step)
        return dataclasses.replace(self, status="interrupted", steps=step, curve=curve, why="")


class Runner(Protocol):
    """Trains runs up to a step, and tells what it saw; what it did before, it only tells."""

    def __call__(self, wanted: Sequence[Request]) -> list[Seen]:
        """In the order of the requests."""


class RangeTester(Protocol):
    """Makes the range test, or tells its result again."""

    def __call__(self) -> dict[str, Any]:
        """At least `suggestion`, `steps` and `why`; `diverged_at` where it did."""


def rounded(lr: float) -> float:
    """A rate with three significant digits.

    >>> rounded(0.0012345)
    0.00123
    """
    return float(f"{lr:.3g}")


def rungs_of(max_steps: int, eval_interval: int) -> tuple[int, ...]:
    """Steps after which rates are given up: about a twelfth and a quarter of a run, where it is evaluated.

    >>> rungs_of(2000, 250), rungs_of(300, 25), rungs_of(100, 100)
    ((250, 500), (25, 75), ())
    """
    if eval_interval <= 0:
        return ()
    found = [max(round(share * max_steps / eval_interval), 1) * eval_interval for share in FIRST_RUNGS]
    return tuple(sorted({r for r in found if r <= max_steps / 2}))


def full_points(runs: Iterable[Seen]) -> list[Point]:
    """Runs at full length that ended well, by their best validation loss."""
    return [Point(r.lr, r.seed, r.best[0]) for r in runs if r.status in ENDED_WELL and r.best is not None]


def against(lr: float, runs: Iterable[Seen]) -> str:
    """Why a rate cannot be recommended, whatever its other runs say; empty: nothing speaks against it.

    A run of its own was lost; or a lower rate diverged with a seed that neither this rate nor a higher one has stood.
    """
    seen = list(runs)
    if own := [r for r in seen if r.lr == lr and r.status in LOST]:
        return ", ".join(f"the run with seed {r.seed} ended as {r.status}" for r in own)
    stood = {p.seed for p in full_points(seen) if p.lr >= lr}
    for r in seen:
        if r.status == "diverged" and r.lr < lr and r.seed not in stood:
            return f"seed {r.seed}, with which {short(r.lr)} diverged, is not run there"
    return ""


def not_ranked(runs: Iterable[Seen]) -> dict[float, str]:
    """Rates that cannot be recommended though a run of theirs ended well, and a sentence why."""
    seen = list(runs)
    told = {p.lr: against(p.lr, seen) for p in sorted(full_points(seen))}
    return {lr: f"{short(lr)} is not ranked: {why}" for lr, why in told.items() if why}


def untried(lr: float, runs: Iterable[Seen]) -> str:
    """With which seed a rate is yet to be run before it can be confirmed, since another rate was lost with it."""
    seen = list(runs)
    stood, reached = {p.seed for p in full_points(seen) if p.lr >= lr}, not_ranked(seen)
    for r in seen:
        if r.lr in reached and r.status in LOST and r.seed not in stood:
            return f"{short(lr)} is not run with seed {r.seed}, with which {short(r.lr)} ended as {r.status}"
    return ""


def not_fitted(fit: Fit | None, runs: Iterable[Seen]) -> str:
    """Why the recommended rate is no minimum of a parabola; empty: it is one."""
    seen = list(runs)
    if fit is None or fit.kind == "fitted":
        return ""
    if fit.kind == "edge_high" and any(r.lr > fit.best and against(r.lr, seen) for r in seen):
        return f"the best rate, {short(fit.best)}, is the highest at full length that ended well with every seed"
    return fit.why


def near(lr: float, rates: Iterable[float], factor: float) -> float:
    """The one of the rates that stands for `lr` in a grid of this factor; `lr` itself where there is none."""
    return next((r for r in rates if abs(math.log(r / lr)) < math.log(factor) / 2), lr)


def beyond(losses: Mapping[float, float], rates: Sequence[float], factor: float) -> float | None:
    """The rate by which a grid is widened whose best one is at an end; None: it lies inside.

    Args:
        losses: of the rates that go on. rates: all that were run, rising.
    """
    best = min(losses, key=lambda lr: losses[lr])
    if not math.isfinite(losses[best]):
        return rounded(min(losses) / factor)  # all are ruined: lower rates may not be
    return rounded(best / factor) if best == rates[0] else rounded(best * factor) if best == rates[-1] else None


def repeated(points: Sequence[Point], confidence: float) -> list[float]:
    """Of runs with one seed: the best rate and those beside it, the nearest to the parabola's minimum first."""
    first = fit_rates(points, confidence=confidence)
    rates = sorted({p.lr for p in points})
    i = rates.index(first.best)
    return sorted(rates[max(i - 1, 0) : i + 2], key=lambda lr: abs(math.log(lr / first.lr)))


def none_ended_well(runs: Iterable[Seen]) -> str:
    """Why there is nothing to choose from."""
    seen = list(runs)
    ended = sorted(r.status for r in seen)
    told = ", ".join(f"{ended.count(status)} {status}" for status in dict.fromkeys(ended))
    rates = [r.lr for r in seen]
    return f"no run ended well ({told}, rates {short(min(rates))} to {short(max(rates))})"


def best_and_beside(losses: Mapping[float, float], keep: int) -> list[float]:
    """The rate of least loss and those next to it, the better side first, its two neighbours always.

    >>> best_and_beside({1.0: 3.0, 2.0: 2.0, 4.0: 2.5, 8.0: 2.6, 16.0: 4.0}, 4)
    [1.0, 2.0, 4.0, 8.0]
    """
    order = sorted(losses)
    best = min(order, key=lambda lr: losses[lr])
    chosen = [best]
    while len(chosen) < min(keep, len(order)):
        i, j = order.index(min(chosen)) - 1, order.index(max(chosen)) + 1
        sides = [order[k] for k in (i, j) if 0 <= k < len(order)]
        if len(chosen) == 2 and len(sides) == 2:  # one neighbour is in: now the other one
            sides = [lr for lr in sides if (lr < best) == (best == min(chosen))]
        chosen.append(min(sides, key=lambda lr: losses[lr]))
    return sorted(chosen)
