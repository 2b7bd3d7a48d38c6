"""The search for a learning rate: which runs are made, for how long, and what follows from their losses.

In: a `Plan` and a `Runner`, which trains (`search.runs`) or, in tests and benches, looks losses up. Out: a `Search`,
whose state `search.files` writes down after every stage. Called by `cli_search`; imports no torch.

Stages: range test (`range_test`) → coarse grid, given up in steps (successive halving, Jamieson and Talwalkar 2016)
→ other seeds at the best rate and its neighbours → parabola (`rate_fit`) → the recommended rate at full length beside
its neighbours (`verdict`). A run that is given up and one that goes on have the schedule of the whole length, so that
what was trained is never trained again. The search is a function of its plan and of what the runner told: after any end
it is simply run again, and the runner answers at once what is done.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

from bytekiln.search.plan import (
    ENDED_WELL,
    SAME,
    STAGES,
    Plan,
    RangeTester,
    Request,
    Runner,
    Seen,
    best_and_beside,
    none_ended_well,
    rounded,
)
from bytekiln.search.rate_fit import Fit, Point, fit_rates
from bytekiln.search.verdict import beside, judged, mean
from bytekiln.sweep.axes import short


class NoRun(Exception):  # noqa: N818 - never leaves `Search.run`
    """No run is left that could win."""


class Search:
    """A search at work."""

    def __init__(
        self,
        plan: Plan,
        runner: Runner,
        range_test: RangeTester | None = None,
        *,
        save: Callable[[Search], object] = lambda _: None,
        say: Callable[[str], object] = lambda _: None,
    ) -> None:
        """`save` is called whenever something was learnt, `say` told in a line."""
        self.plan, self.runner, self.range_test, self.save, self._say = plan, runner, range_test, save, say
        self.status = "running"
        """running, stopped (behind the stage that was asked for), confirmed, unconfirmed, failed."""
        self.stage = ""
        self.found_range: dict[str, Any] = {}
        self.runs: dict[tuple[float, int], Seen] = {}
        """By (rate, seed)."""
        self.promised = plan.least_steps - plan.range_steps
        """Steps that must stay for what the plan needs: the rest of the coarse grid, and the run that confirms."""
        self.widened: list[float] = []
        self.notes: list[str] = []
        """What deserves attention, a sentence each."""
        self.fit: Fit | None = None
        """Of the runs before the confirmation; it recommends."""
        self.last_fit: Fit | None = None
        """Of all runs, those of the confirmation included: its interval is the narrowest."""
        self.predicted_loss: float | None = None
        """By the fit before the confirmation, for the seeds that confirm."""
        self.recommended: float | None = None
        self.confirmed_loss: float | None = None
        self.neighbours: list[tuple[float, float]] = []
        """(rate, loss) beside the recommended one: `confirmed_loss` and the mean difference over the seeds of both."""

    # --- the whole --------------------------------------------------------------------------------------------

    def run(self, until: str = STAGES[-1]) -> Search:
        """All stages up to `until`; the search itself, its `status` failed where no run ended well."""
        try:
            centre = self._centre()
            if self._goes_on("range_test", until):
                self._coarse(centre)
                if self._goes_on("coarse", until):
                    self._seeds()
                    if self._goes_on("seeds", until):
                        self._fit()
                        if self._goes_on("fit", until):
                            self._confirm()
        except NoRun as exc:
            self.status = "failed"
            self._note(str(exc))
        self.save(self)
        return self

    def _goes_on(self, stage: str, until: str) -> bool:
        self.stage = stage
        if stage == until:
            self.status = "stopped"
            return False
        self.save(self)
        return True

    # --- what it has ------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Steps taken so far, the range test's included."""
        return int(self.found_range.get("steps", 0)) + sum(r.steps for r in self.runs.values())

    def rates(self) -> list[float]:
        """Rates that were run."""
        return sorted({lr for lr, _ in self.runs})

    def full(self) -> list[Point]:
        """Runs at full length that ended well, by their best validation loss."""
        return [
            Point(r.lr, r.seed, r.best[0]) for r in self.runs.values() if r.status in ENDED_WELL and r.best is not None
        ]

    def _ask(self, stage: str, rates: Iterable[float], seed: int, until: int) -> None:
        """Have runs trained up to a step; those that have ended are not asked for."""
        wanted = []
        for lr in rates:
            known = self.runs.get((lr, seed))
            if known is None or (known.status == "interrupted" and known.steps < until):
                wanted.append(Request(known.stage if known else stage, lr, seed, until))
        if wanted:
            self._say(
                f"{stage}: {len(wanted)} run{'s' * (len(wanted) > 1)} to step {until} of {self.plan.max_steps}: "
                + ", ".join(short(w.lr) for w in wanted)
                + f", seed {seed}"
            )
            for seen in self.runner(wanted):
                self.runs[seen.lr, seen.seed] = seen.as_of(until)
        self.save(self)

    def _affords(self, steps: float) -> bool:
        """Whether so many steps can be taken beside those that are promised."""
        return self.steps + self.promised + steps <= self.plan.limit

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            self._say(text)

    # --- range test and coarse grid ---------------------------------------------------------------------------

    def _centre(self) -> float:
        self.stage = "range_test"
        if self.plan.centre and not self.plan.range_steps:
            return self.plan.centre
        assert self.range_test is not None, "a plan with a range test needs one"
        self.found_range = self.range_test()
        self._say(f"range test: {self.found_range['why']}")
        return self.plan.centre or float(self.found_range["suggestion"])

    def _coarse(self, centre: float) -> None:
        plan, seed = self.plan, self.plan.seeds[0]
        self.stage = "coarse"
        alive = plan.grid(centre)
        for i, (rung, keep) in enumerate(plan.stops):
            alive = self._at_rung(alive, seed, i)
            if keep:
                alive = self._kept(alive, seed, rung, keep)
        self._bracket(seed)

    def _promise(self, alive: int, stop: int) -> None:
        """Keep steps for so many rates to go on from a stop of the grid to the end, and for the confirmation."""
        keep = self.plan.stops[stop][1]
        self.promised = self.plan.coarse_steps(min(alive, keep), stop + 1) + self.plan.max_steps

    def _at_rung(self, alive: list[float], seed: int, stop: int) -> list[float]:
        """Train all to a rung; where the best one is at an end of all rates so far, take in further ones."""
        rung = self.plan.stops[stop][0]
        self._ask("coarse", alive, seed, rung)
        while True:
            self._promise(len(alive) + 1, stop)  # a further rate included
            losses = {lr: self._loss(lr, seed, rung) for lr in alive}
            best = min(alive, key=lambda lr: losses[lr])
            if not math.isfinite(losses[best]):
                further = min(alive) / self.plan.factor  # all are ruined: lower rates may not be
            elif best == min(self.rates()):
                further = best / self.plan.factor
            elif best == max(self.rates()):
                further = best * self.plan.factor
            else:
                return sorted(alive)
            further = rounded(further)
            if not self._widen(further, rung):
                if not math.isfinite(losses[best]):
                    raise NoRun(none_ended_well(self.runs.values()))
                return sorted(alive)
            alive.append(further)
            self._ask("coarse", [further], seed, rung)

    def _widen(self, lr: float, cost: float) -> bool:
        """Take in a rate beyond the end, if that is allowed."""
        side = "lower" if not self.runs or lr < min(self.rates()) else "higher"
        why = ""
        if len(self.widened) >= self.plan.widenings:
            why = f"it was widened {self.plan.widenings} times"
        elif not self.plan.low <= lr <= self.plan.high:
            why = f"{short(lr)} is outside {short(self.plan.low)} to {short(self.plan.high)}"
        elif not self._affords(cost):
            why = "the search's steps are used up"
        if why:
            self._note(f"the best rate is at the {side[:-2]}est end of the range, which is not widened: {why}")
            return False
        self.widened.append(lr)
        self._note(f"the best rate is at the end of the range: widened to {short(lr)}")
        return True

    def _kept(self, alive: list[float], seed: int, rung: int, keep: int) -> list[float]:
        """The best rate at a rung and those beside it; the others are given up, each with a reason."""
        order = sorted(alive)
        losses = {lr: self._loss(lr, seed, rung) for lr in order}
        best = min(order, key=lambda lr: losses[lr])
        chosen = best_and_beside(losses, keep)
        for lr in order:
            known = self.runs[lr, seed]
            if lr not in chosen and known.status == "interrupted" and not known.given_up:
                why = f"step {rung}: loss {losses[lr]:.4f}, {losses[lr] - losses[best]:.4f} above that of {short(best)}"
                self.runs[lr, seed] = dataclasses.replace(known, given_up=why)
        self.save(self)
        return chosen

    def _bracket(self, seed: int) -> None:
        """The best rate has a neighbour at full length on either side, as far as rates and steps allow."""
        plan = self.plan
        while True:
            losses = {lr: self._loss(lr, seed, plan.max_steps) for lr in self.rates() if self._is_full(lr, seed)}
            if not losses or not math.isfinite(min(losses.values())):
                raise NoRun(none_ended_well(self.runs.values()))
            best = min(losses, key=lambda lr: losses[lr])
            lacking = []
            for further in (rounded(best / plan.factor), rounded(best * plan.factor)):
                near = [lr for lr in self.rates() if abs(math.log(lr / further)) < math.log(plan.factor) / 2]
                lr = near[0] if near else further
                known = self.runs.get((lr, seed))
                if known is None or known.status == "interrupted":
                    lacking.append((lr, plan.max_steps - (known.steps if known else 0), known is None))
            for lr, cost, new in lacking:
                if new and not self._widen(lr, cost):
                    continue
                if not new and not self._affords(cost):
                    self._note(
                        f"{short(lr)}, beside the best rate, is not run to the end: the search's steps are used up"
                    )
                    continue
                if not new:
                    self.runs[lr, seed] = dataclasses.replace(self.runs[lr, seed], given_up="")
                    self._note(f"{short(best)} is the best at full length: {short(lr)} beside it goes on after all")
                self._ask("coarse", [lr], seed, plan.max_steps)
                break
            else:
                return

    def _is_full(self, lr: float, seed: int) -> bool:
        known = self.runs.get((lr, seed))
        return known is not None and known.status != "interrupted"

    def _loss(self, lr: float, seed: int, step: int) -> float:
        known = self.runs.get((lr, seed))
        return math.inf if known is None else known.loss_at(step)

    # --- seeds, fit, confirmation -----------------------------------------------------------------------------

    def _seeds(self) -> None:
        """Other seeds at the best rate and its neighbours, the best first; as many as there are steps for."""
        self.stage, plan = "seeds", self.plan
        points = self.full()
        if not points:
            raise NoRun(none_ended_well(self.runs.values()))
        first = fit_rates([p for p in points if p.seed == plan.seeds[0]], confidence=plan.confidence)
        rates = sorted({p.lr for p in points})
        i = rates.index(first.best)
        order = sorted(rates[max(i - 1, 0) : i + 2], key=lambda lr: abs(math.log(lr / first.lr)))
        for seed in plan.seeds[1:]:
            left = int((plan.limit - self.promised - self.steps) / plan.max_steps)
            if left < len(order):
                short_of = ", ".join(short(lr) for lr in order[max(left, 0) :])
                self._note(f"seed {seed} is not run at {short_of}: the search's steps are used up")
            if left > 0:
                self._ask("seeds", order[:left], seed, plan.max_steps)

    def _fit(self) -> None:
        self.stage = "fit"
        plan, rates = self.plan, self.rates()
        self.fit = fit_rates(self.full(), confidence=plan.confidence, span=(rates[0], rates[-1]))
        self.recommended = rounded(self.fit.lr)
        close = [lr for lr in {p.lr for p in self.full()} if abs(math.log(lr / self.recommended)) < SAME]
        if close:
            self.recommended = min(close, key=lambda lr: abs(math.log(lr / self.fit.lr)))  # type: ignore[union-attr]
        self._say(
            f"fit: {short(self.recommended)} ({self.fit.why}), {100 * plan.confidence:g} % interval "
            f"{short(rounded(self.fit.low))} to {short(rounded(self.fit.high))}, predicted loss {self.fit.loss:.4f}"
        )
        if self.fit.kind != "fitted":
            self._note(self.fit.why)

    def _confirm(self) -> None:
        """The recommended rate at full length, held against its neighbours; the better one wins."""
        self.stage, plan, seed = "confirm", self.plan, self.plan.seeds[0]
        assert self.fit is not None and self.recommended is not None
        lr = self.recommended
        self._ask("confirm", [lr], seed, plan.max_steps)
        self.promised = 0
        point = next((p for p in self.full() if (p.lr, p.seed) == (lr, seed)), None)
        if point is None:
            ended = self.runs[lr, seed]
            self._note(
                f"the run at {short(lr)} ended as {ended.status}; the best rate that ended well is given instead"
            )
            self.recommended, self.status = self.fit.best, "unconfirmed"
            self.confirmed_loss = mean(p.loss for p in self.full() if p.lr == self.fit.best)
            return
        self._repeat(lr)
        self.last_fit = fit_rates(self.full(), confidence=plan.confidence, span=(self.rates()[0], self.rates()[-1]))
        found = judged(lr, self.full(), self.fit)
        for note in found.notes:
            self._note(note)
        self.recommended, self.neighbours = found.recommended, found.neighbours
        self.confirmed_loss, self.predicted_loss = found.confirmed_loss, found.predicted_loss
        self.status = "confirmed" if found.confirmed else "unconfirmed"

    def _repeat(self, lr: float) -> None:
        """What steps are left go into the other seeds of the recommended rate and of those beside it."""
        for seed in self.plan.seeds:
            for rate in (lr, *beside(lr, self.full())):
                if (rate, seed) not in self.runs and self._affords(self.plan.max_steps):
                    self._ask("confirm", [rate], seed, self.plan.max_steps)
