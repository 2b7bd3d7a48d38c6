"""Which experiments there are: pipelines by name, and what a sweep's end adds to its folder.

In: a name, or a sweep. Out: functions, or none. Called by `cli_sweep`; imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bytekiln.experiments.exp9 import LONG, QUICK, SEARCH, exp9
from bytekiln.experiments.lr_search import After, write_long, write_search
from bytekiln.sweep.model import SweepSpec
from bytekiln.sweep.results import RANKED, TrialResult, best_repeats, exit_status

Pipeline = Callable[[list[str]], int]
PIPELINES: dict[str, Pipeline] = {"exp9": exp9}
AFTER: dict[str, After] = {QUICK: write_search, SEARCH: write_search, LONG: write_long}
"""By `SweepSpec.shipped`."""


def pipeline(name: str) -> Pipeline | None:
    """The experiment of several stages by this name: argument list in, exit status out."""
    return PIPELINES.get(name.replace("_", "-"))


def after(spec: SweepSpec) -> After | None:
    """What writes the files that belong to a sweep of ours; called whenever it has ended.

    Ours is what was loaded from our presets, and its folder: a user's own sweep may have any name.
    """
    return AFTER.get(spec.shipped)


def status(spec: SweepSpec, results: Sequence[TrialResult]) -> int:
    """Exit status of a sweep that is over: of a search of ours without a rate to recommend never 0."""
    ended = exit_status(results)
    if after(spec) is not write_search or best_repeats(results) is not None:
        return ended
    return ended or (4 if any(r.status in RANKED for r in results) else 1)
