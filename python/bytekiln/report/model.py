"""What a report is made of. Made by `report`; the page, the pictures and the tables are drawn from it. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from bytekiln.report.groups import Comparison, Group, answer, best_group, compare, find_baseline, grouped, question
from bytekiln.report.rates import RateSeries, rate_series
from bytekiln.report.runs import Run


@dataclass(frozen=True)
class Report:
    """Runs, and what they say together."""

    title: str
    groups: list[Group]
    baseline: Group | None
    points: int
    """Most points of a training curve."""

    @classmethod
    def of(cls, runs: Sequence[Run], *, title: str = "", baseline: str = "", points: int = 0) -> Report:
        """Group and compare runs.

        Args:
            runs: at least one.
            title: of the page; empty: the sweep's or the run's name.
            baseline: group or run that the others are compared with; empty: what the sweeps say.
            points: most points of a training curve that the runs were read with.

        Raises:
            ConfigError: no group or run is called like the baseline.
        """
        groups = grouped(runs)
        if not title:
            sweeps = dict.fromkeys(r.asked.folder.resolve().name for r in runs if r.asked)
            alone = [*sweeps] if sweeps and all(r.asked for r in runs) else []
            title = ", ".join(alone[:3]) if alone else runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
        return cls(title, groups, find_baseline(groups, baseline, runs), points)

    @property
    def runs(self) -> list[Run]:
        """All runs, group by group."""
        return [r for g in self.groups for r in g.runs]

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Every group against the baseline; empty without one."""
        return compare(self.groups, self.baseline) if self.baseline and len(self.groups) > 1 else []

    @cached_property
    def rates(self) -> list[RateSeries]:
        """Loss against learning rate, where that varies."""
        return rate_series(self.groups)

    @cached_property
    def best(self) -> Group | None:
        """The group of lowest loss."""
        return best_group(self.groups)

    @cached_property
    def question(self) -> str:
        """What was asked."""
        return question(self.groups, dict.fromkeys(r.asked.question for r in self.runs if r.asked and r.asked.question))

    @cached_property
    def answer(self) -> str:
        """What the numbers say; of a search its recommendation first."""
        searched = {r.asked.recommendation if r.asked else "" for r in self.runs}
        said = answer(self.groups, self.baseline)
        if len(searched) == 1 and (recommended := searched.pop()):
            return f"{recommended} {said}"
        fits = [s for s in self.rates if s.fit is not None and s.fit.kind == "fitted"]
        if len(fits) == 1:
            said += f" Over the learning rate, {fits[0].said}"
        return said
