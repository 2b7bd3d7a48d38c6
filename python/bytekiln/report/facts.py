"""What is said of one variant in an analysis: numbers of its runs, and each of them in words.

In: a group of runs. Out: `Facts`. Called by `report.contrasts` and `report.analysis`; numpy only. Each number is the
mean over the variant's seeds; of losses their σ is told too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bytekiln.config import UNLIMITED_STEPS
from bytekiln.console import human_time
from bytekiln.errors import BytekilnError
from bytekiln.report.groups import FEW_SEEDS, Comparison, Group
from bytekiln.report.rows import Floats, read_table
from bytekiln.report.runs import Run, metrics_file
from bytekiln.report.stability import spread

EARLY, FASTER = 0.1, 0.05
"""Share of the run that is its beginning; by how much more the loss must fall in it to be called fast."""
ENDED = ("completed", "early_stopped")


@dataclass
class Trace:
    """A run and the training losses of all its steps, nats a token; the report's curves are thinned."""

    run: Run
    steps: Floats
    losses: Floats

    @classmethod
    def of(cls, run: Run) -> Trace:
        """Read them once more; none where there are none."""
        try:
            return cls(run, *read_table(metrics_file(run.folder, run.config)).of("loss"))
        except BytekilnError:
            return cls(run, np.empty(0), np.empty(0))

    def level(self, low: float, high: float) -> float | None:
        """Mean loss of the steps above `low` up to `high`; None where the run has none of the last of them."""
        inside = (self.steps > low) & (self.steps <= high)
        reached = len(self.steps) > 0 and self.steps[-1] >= high
        return float(self.losses[inside].mean()) if reached and inside.any() else None

    def fall(self, step: int) -> float | None:
        """By how much the loss lies below that of the first step at `step`, over its last tenth (5 steps at least)."""
        level = self.level(step - max(5, step // 10), step)
        return None if level is None else float(self.losses[0]) - level


@dataclass
class Facts:
    """A variant's numbers."""

    group: Group
    traces: list[Trace]

    @classmethod
    def of(cls, group: Group) -> Facts:
        """Read what the report has thinned."""
        return cls(group, [Trace.of(r) for r in group.runs])

    @property
    def name(self) -> str:
        """The variant's."""
        return self.group.name

    @property
    def runs(self) -> list[Run]:
        """One a seed."""
        return self.group.runs

    @property
    def diverged(self) -> list[Run]:
        """Those of its runs that did."""
        return [r for r in self.runs if r.status == "diverged"]

    @property
    def ended(self) -> list[Run]:
        """Those of its runs that ended well."""
        return [r for r in self.runs if r.status in ENDED]

    def number(self, name: str) -> float | None:
        """Mean of a number of the results, over the runs that ended well where there are some."""
        return mean([v for r in self.ended or self.runs if (v := r.number(name)) is not None])

    def field(self, name: str) -> float:
        """A number of the config; 0 where it has none."""
        value = self.runs[0].config.get(name)
        return float(value) if isinstance(value, int | float) else 0.0

    @property
    def sequences(self) -> float:
        """In an optimizer step."""
        return self.field("batch_size") * max(self.field("grad_accum_steps"), 1.0)

    def fall(self, step: int) -> float | None:
        """See `Trace.fall`; None where one of the runs is not so long."""
        falls = [t.fall(step) for t in self.traces]
        return mean([f for f in falls if f is not None]) if falls and None not in falls else None

    @property
    def begun(self) -> bool:
        """Whether one of its runs has a row."""
        return any(r.steps or r.curves for r in self.runs)

    @property
    def validated(self) -> bool:
        """Whether a run was evaluated after a step: before the first one a loss tells nothing of the run."""
        return any((c := r.curves.get("val_loss")) is not None and c.x[-1] > 0 for r in self.runs)

    @cached_property
    def gap(self) -> float | None:
        """Validation loss minus that on training data, in evaluation mode, at the end."""
        of = (self.ended or self.runs) if self.validated else []
        pairs = [(r.number("final_val_loss"), r.number("final_train_eval_loss")) for r in of]
        return mean([v - t for v, t in pairs if v is not None and t is not None])

    def stable(self, name: str) -> float | None:
        """Mean of a number of stability."""
        found = [getattr(r.stability, name) for r in self.runs if r.stability]
        return mean([float(v) for v in found if v is not None])


def mean(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return spread(values)[0] if values else None


def early_step(facts: Sequence[Facts]) -> int:
    """A tenth of the shortest run, the step at which beginnings are compared; 5 at least.

    Of a run that has not ended well it is the planned length that counts.
    """
    lengths = []
    for run in (r for f in facts for r in f.runs):
        planned = run.config.get("max_steps")
        if run.status in ENDED and run.steps:
            lengths.append(run.steps)
        elif isinstance(planned, int) and planned < UNLIMITED_STEPS:
            lengths.append(planned)
    return max(5, round(EARLY * min(lengths, default=0)))


# --- in words -----------------------------------------------------------------------------------------------------


def told(value: float | None, form: str = ".4f") -> str:
    """A number, or a dash."""
    return "—" if value is None else format(value, form)


def several(values: Sequence[float], form: str = ".4f") -> str:
    """Mean and σ over seeds.

    >>> several([1.0, 2.0], ".2f"), several([1.0], ".1f"), several([])
    ('1.50 ± 0.71', '1.0', '—')
    """
    if not values:
        return "—"
    middle, sigma = spread(values)
    return format(middle, form) + (f" ± {format(sigma, form)}" if sigma is not None else "")


def listed(names: Sequence[str]) -> str:
    """With commas and an `and`.

    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def early(facts: Facts, base: Facts | None, step: int) -> str:
    """How fast the loss falls in the beginning, against the baseline."""
    own = facts.fall(step)
    if own is None:
        return f"not known: it has fewer than {step:,} steps"
    said = f"{own:.4f} in the first {step:,} steps"
    other = base.fall(step) if base is not None and base is not facts else None
    if other is None or base is None:
        return said
    if other <= 0 or own <= 0:
        return f"{'slow' if own < other else 'fast'}: {said}, {other:.4f} with {base.name}"
    word = "fast" if own > (1 + FASTER) * other else "slow" if own < (1 - FASTER) * other else "much the same"
    return f"{word}: {said}, {own / other:.2f} times the {other:.4f} of {base.name}"


def ending(facts: Facts) -> str:
    """Converged: yes, no or oscillating, by the last tenth of the training loss."""
    if facts.diverged:
        return f"no: {divergence(facts)}"
    ends = Counter(r.stability.end if r.stability else "too short to tell" for r in facts.ended)
    if not ends:
        return f"not known: {statuses(facts)}"
    word = {"converged": "yes", "still falling": "no, still falling", "oscillating": "no, oscillating"}
    if len(ends) == 1:
        said = word.get(next(iter(ends)), "too short to tell")
    else:
        said = listed([f"{word.get(end, end)} in {n} of {len(facts.ended)} runs" for end, n in ends.most_common()])
    slope, error = facts.stable("slope"), facts.stable("slope_error")
    if slope is not None:
        said += f" ({slope:+.4f} ± {error or 0:.4f} nats a token per 1,000 steps over the last 10 %)"
    best = [(r.number("best_step"), r.steps) for r in facts.ended]
    if said.startswith("yes (") and all(step == last for step, last in best):
        said = f"yes, as far as the noise tells {said[4:]}; but its validation loss was lowest at the last step"
    return said


def divergence(facts: Facts) -> str:
    """When it diverged, and how many of its runs."""
    steps = sorted({r.steps for r in facts.diverged})
    at = f"step {steps[0]:,}" if len(steps) == 1 else f"steps {steps[0]:,} to {steps[-1]:,}"
    share = "" if len(facts.runs) == 1 else f" in {len(facts.diverged)} of {len(facts.runs)} runs"
    return f"diverged at {at}{share}"


def statuses(facts: Facts) -> str:
    """How its runs ended.

    An unfinished run is one without a result.
    """
    found = Counter(r.status.replace("_", " ") for r in facts.runs)
    return listed([name if len(facts.runs) == 1 else f"{n} {name}" for name, n in found.most_common()])


def stable(facts: Facts) -> str:
    """The numbers of stability."""
    spikes, chance = facts.stable("spikes"), facts.stable("expected_spikes")
    norm, sigma = facts.stable("largest_grad_norm"), facts.stable("sigma")
    at = [r.stability.largest_grad_step for r in facts.runs if r.stability]
    where = f" at step {at[0]:,}" if len(at) == 1 and at[0] is not None else ""
    few = "spike" if spikes == 1 else "spikes"
    parts = [] if sigma is None else [f"{spikes:.3g} {few} above 3 σ ({chance:.1f} by chance)", f"σ {sigma:.4f}"]
    parts += [] if norm is None else [f"largest gradient norm {norm:.3g}{where}"]
    each = ", means over the runs" if len(facts.runs) > 1 and parts else ""
    return ", ".join(parts) + each if parts else "too short to tell"


def validation(facts: Facts) -> str:
    """Last and best validation loss."""
    of = facts.ended or facts.runs
    finals = [v for r in of if (v := r.number("final_val_loss")) is not None]
    best = [(v, r.number("best_step")) for r in of if (v := r.number("best_val_loss")) is not None]
    if not best or not facts.validated:
        return "none after the first step" if best else "none"
    steps = sorted({int(s) for _, s in best if s is not None})
    at = f" at step {listed([f'{s:,}' for s in steps])}" if steps else ""
    return f"{several(finals)} at the end, best {several([v for v, _ in best])}{at}"


def train_against_validation(facts: Facts) -> str:
    """Loss on training data in evaluation mode, and the gap."""
    train, val = facts.number("final_train_eval_loss"), facts.number("final_val_loss")
    if train is None or val is None or facts.gap is None:
        return "not measured"
    return f"{train:.4f} against {val:.4f} at the end, gap {facts.gap:+.4f}"


def cost(facts: Facts) -> str:
    """Time, speed, parameters."""
    seconds, speed, size = facts.number("wall_time_s"), facts.number("tokens_per_s"), facts.number("parameters")
    parts = [f"{human_time(seconds)}{' a run' * (len(facts.runs) > 1)}"] if seconds else []
    parts += [f"{speed:,.0f} tokens a second"] if speed else []
    parts += [f"{size:,.0f} parameters"] if size else []
    return ", ".join(parts) or "not known"


def significance(comparison: Comparison) -> str:
    """Whether a difference is more than chance."""
    seeds = min(len(comparison.group.losses), len(comparison.other.losses))
    verdict, p = comparison.verdict, comparison.p
    if p is None:
        return "one run each cannot tell an effect from noise"
    if verdict == FEW_SEEDS:
        return "far above the spread over seeds, but two seeds are too few to confirm it"
    how = f"p = {p:.2g} over {seeds} seeds"
    return f"not distinguishable from noise, {how}" if verdict == "not distinguishable" else f"more than chance, {how}"


def conclusion(facts: Facts, comparison: Comparison, lead: str) -> str:
    """The difference to the baseline in one sentence, which begins with `lead`."""
    other, difference = comparison.other, comparison.difference
    if facts.diverged and len(facts.diverged) == len(facts.runs):
        return f"{lead} training {divergence(facts)}."
    if difference is None or other.mean is None or facts.group.mean is None:
        why = f"its runs: {statuses(facts)}" if facts.group.mean is None else f"{other.name} has no validation loss"
        return f"{lead} there is no validation loss to compare ({why})."
    if abs(difference.mean) < 5e-5:
        said = f"{lead} the best validation loss is that of {other.name} to four digits ({facts.group.mean:.4f})"
    else:
        word = "higher" if difference.mean > 0 else "lower"
        said = (
            f"{lead} the best validation loss is {abs(difference.mean):.4f} {word} than with {other.name} "
            f"({facts.group.mean:.4f} against {other.mean:.4f})"
        )
    rest = f"; it {divergence(facts)}" if facts.diverged else ""
    return f"{said}: {significance(comparison)}{rest}."


def lead_of(facts: Facts) -> tuple[str, str]:
    """(question, how the answer begins) of a variant: what the sweep says before and behind its question mark."""
    run = facts.runs[0]
    asked = run.asked.questions.get(run.variant or "base", "") if run.asked else ""
    question, mark, lead = asked.rpartition("?")
    if not mark:
        question, lead = "", asked
    return (question + mark).strip(), lead.strip() or f"With {facts.name}"


def ranked(facts: Sequence[Facts], key: Callable[[Facts], float | None]) -> list[Facts]:
    """Lowest first; those without a number, and those of which a run did not end well, left out."""
    known = [(v, i, f) for i, f in enumerate(facts) if len(f.ended) == len(f.runs) and (v := key(f)) is not None]
    return [f for v, _, f in sorted(known) if not math.isnan(v)]
