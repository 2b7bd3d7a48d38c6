"""The search for a learning rate: which runs are made, for how long, and what follows from their losses.

In: a `Plan` and a `Runner`, which trains (`search.runs`) or, in tests and benches, looks losses up. Out: a `Search`,
whose state `search.files` writes down after every stage. Called by `cli_search`; imports no torch.

Stages: range test (`range_test`) → coarse grid, given up in steps (successive halving, Jamieson and Talwalkar 2016)
→ other seeds at the best rate and its neighbours → parabola (`rate_fit`) → the recommended rate at full length beside
its neighbours (`verdict`). A rate with a seed that was lost is never recommended. A run that is given up and one that
goes on have the schedule of the whole length, so that what was trained is never trained again. The search is a function
of its plan and of what the runner told: after any end it is simply run again, and what is done is answered at once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bytekiln.search.plan import (
    LOST,
    SAME,
    STAGES,
    Notes,
    Plan,
    RangeTester,
    Request,
    Runner,
    Seen,
    against,
    best_and_beside,
    beyond,
    full_points,
    near,
    none_ended_well,
    not_fitted,
    not_ranked,
    repeated,
    rounded,
    untried,
)
from bytekiln.search.rate_fit import Fit, Point, fit_rates
from bytekiln.search.verdict import beside, judged
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
        self.notes = Notes(say)
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
            behind: list[Callable[[], None]]
            behind = [lambda: self._coarse(centre), self._seeds, self._fit, self._confirm]
            for stage, then in zip(STAGES[:-1], behind, strict=True):
                self.stage = stage
                if stage == until:
                    self.status = "stopped"
                    break
                if self.runs:  # before the first ones are told, what an earlier session wrote stays
                    self.save(self)
                then()
        except NoRun as exc:
            self.status = "failed"
            self.notes.add(str(exc))
        self.notes.settle()
        self.save(self)
        return self

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
        return full_points(self.runs.values())

    def sound(self) -> list[Point]:
        """Those of `full` whose rate can be recommended: only they are fitted and ranked."""
        lost = not_ranked(self.runs.values())
        return [p for p in self.full() if p.lr not in lost]

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

    def _at_rung(self, alive: list[float], seed: int, stop: int) -> list[float]:
        """Train all to a rung; where the best one is at an end of all rates so far, take in further ones."""
        rung, keep = self.plan.stops[stop]
        self._ask("coarse", alive, seed, rung)
        while True:
            going_on = min(len(alive) + 1, keep)  # a further rate included
            self.promised = self.plan.coarse_steps(going_on, stop + 1) + self.plan.max_steps
            losses = {lr: self._loss(lr, seed, rung) for lr in alive}
            further = beyond(losses, self.rates(), self.plan.factor)
            if further is None:
                return sorted(alive)
            if not self._widen(further, rung):
                if not math.isfinite(min(losses.values())):
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
            told = f"the best rate is at the {side[:-2]}est end of the range, which is not widened: {why}"
            end = min if side == "lower" else max
            self.notes.add(told, lambda: told if self.recommended in (None, end(self.rates())) else "")
            return False
        self.widened.append(lr)
        self.notes.add(f"the best rate is at the end of the range: widened to {short(lr)}")
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
                lr = near(further, self.rates(), plan.factor)
                known = self.runs.get((lr, seed))
                if known is None or known.status == "interrupted":
                    lacking.append((lr, plan.max_steps - (known.steps if known else 0), known is None))
            for lr, cost, new in lacking:
                if new and not self._widen(lr, cost):
                    continue
                if not new and not self._affords(cost):
                    told = f"{short(lr)}, beside the best rate, is not run to the end: the search's steps are used up"
                    self.notes.add(told, lambda told=told, lr=lr: "" if self._is_full(lr, seed) else told)  # type: ignore[misc]
                    continue
                if not new:
                    self.runs[lr, seed] = dataclasses.replace(self.runs[lr, seed], given_up="")
                    self.notes.add(f"{short(best)} is the best at full length: {short(lr)} beside it goes on after all")
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
        order = repeated([p for p in self.full() if p.seed == plan.seeds[0]], plan.confidence)
        for seed in plan.seeds[1:]:
            left = max(int((plan.limit - self.promised - self.steps) / plan.max_steps), 0)
            alive = [lr for lr in order if not any(r.lr == lr and r.status in LOST for r in self.runs.values())]
            unrun = functools.partial(self._unrun, seed, alive[left:])
            self.notes.add(unrun(), unrun)  # the confirmation may have steps for it
            self._ask("seeds", alive[:left], seed, plan.max_steps)
        self._lower()

    def _unrun(self, seed: int, rates: Sequence[float]) -> str:
        lacking = [short(lr) for lr in rates if not self._is_full(lr, seed)]
        return f"seed {seed} is not run at {', '.join(lacking)}: the search's steps are used up" if lacking else ""

    def _lower(self) -> None:
        """Where no rate is left since some diverged, the next lower one is run, if there are steps for two seeds."""
        plan, first = self.plan, self.plan.seeds[0]
        while not self.sound() and any("diverged" in n for n in not_ranked(self.runs.values()).values()):
            lowest = min(lr for lr in self.rates() if self._is_full(lr, first))
            lr = near(rounded(lowest / plan.factor), self.rates(), plan.factor)
            known = self.runs.get((lr, first))
            cost = 2 * plan.max_steps - (known.steps if known else 0)
            if lr < plan.low or self.steps + cost > plan.limit:  # those that are promised to the confirmation, too
                return
            self.notes.add(f"no rate at full length ended well with every seed: {short(lr)} is run to the end")
            self._ask("coarse", [lr], first, plan.max_steps)
            for seed in plan.seeds[1:]:
                if not against(lr, self.runs.values()) and self.steps + plan.max_steps <= plan.limit:
                    self._ask("seeds", [lr], seed, plan.max_steps)

    def _fitted(self) -> Fit:
        return fit_rates(self.sound(), confidence=self.plan.confidence, span=(self.rates()[0], self.rates()[-1]))

    def _fit(self) -> None:
        self.stage, plan = "fit", self.plan
        self._name_not_ranked()
        if not self.sound():
            return
        self.fit = fit = self._fitted()
        lr = rounded(fit.lr)
        close = [p.lr for p in sorted(self.full()) if abs(math.log(p.lr / lr)) < SAME]
        self.recommended = min(close or [lr], key=lambda lr: abs(math.log(lr / fit.lr)))
        self._say(
            f"fit: {short(self.recommended)} ({self.fit.why}), {100 * plan.confidence:g} % interval "
            f"{short(rounded(self.fit.low))} to {short(rounded(self.fit.high))}, predicted loss {self.fit.loss:.4f}"
        )
        told: Callable[[], str] = lambda: not_fitted(self.last_fit or fit, self.runs.values())  # noqa: E731
        self.notes.add(told(), told)

    def _name_not_ranked(self) -> None:
        for lr, why in not_ranked(self.runs.values()).items():
            self.notes.add(why, lambda lr=lr: not_ranked(self.runs.values()).get(lr, ""))  # type: ignore[misc]

    def _confirm(self) -> None:
        """The recommended rate at full length, held against its neighbours; the better one wins."""
        self.stage, first = "confirm", self.recommended
        while (lr := self.recommended) is not None:
            self._ask("confirm", [lr], self.plan.seeds[0], self.plan.max_steps)
            self.promised = 0
            if not against(lr, self.runs.values()):
                self._repeat(lr)
            why = against(lr, self.runs.values())
            if not why:
                break
            self.notes.add(f"{short(lr)} is not recommended: {why}; the best rate without such a seed is given instead")
            self._lower()
            self.recommended = self._fitted().best if self.sound() else None
        self._name_not_ranked()
        if lr is None:
            self.status = "unconfirmed"
            self.notes.add("no rate ended well with every seed")
            return
        assert self.fit is not None
        self.last_fit = self._fitted()
        found, missing = judged(lr, self.sound(), self.fit), untried(lr, self.runs.values())
        for note in (*found.notes, missing):
            self.notes.add(note)
        self.recommended, self.neighbours = found.recommended, found.neighbours
        self.confirmed_loss, self.predicted_loss = found.confirmed_loss, found.predicted_loss
        self.status = "confirmed" if found.confirmed and lr == first and not missing else "unconfirmed"

    def _repeat(self, lr: float) -> None:
        """What steps are left go into the other seeds of the recommended rate and of those beside it."""
        for seed in self.plan.seeds:
            for rate in (lr, *beside(lr, self.sound())):
                if (rate, seed) not in self.runs and self._affords(self.plan.max_steps):
                    self._ask("confirm", [rate], seed, self.plan.max_steps)
