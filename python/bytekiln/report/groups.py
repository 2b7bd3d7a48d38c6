"""Runs that are the same but for the seed, and what can be said of their differences.

In: `Run`s. Out: `Group`s, comparisons with the baseline, the answer in a sentence. Called by `report`; no torch.

Compared are the best validation losses of runs that ended well. Groups whose seeds match are compared by pairs of equal
seeds (same weights at the start, same batches), others by Welch's test; p-values of one table are corrected by Holm's
method. Below 0.05 two groups are called different.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bytekiln.config import SECTION_OF
from bytekiln.console import nearest
from bytekiln.errors import ConfigError
from bytekiln.report.runs import Run
from bytekiln.report.stability import spread
from bytekiln.section import Value
from bytekiln.student import Difference, holm, paired, welch
from bytekiln.sweep.axes import exact_name, short

LEVEL = 0.05
"""Of significance."""
FAR, FEW_SEEDS = 4.0, "two seeds: too few to tell"
"""A difference of so many σ is large, though a test with one degree of freedom may not call it significant."""
UNTOLD = ("seed", "preset")
"""Fields that make no other group, beside those of the section `output`."""


@dataclass
class Group:
    """Runs that differ in nothing but the seed."""

    name: str
    runs: list[Run]
    changes: dict[str, Value] = field(default_factory=dict)
    """Fields that differ between groups, and this one's values."""

    @property
    def losses(self) -> dict[int | None, float]:
        """Best validation loss by seed, of the runs that ended well; a seed that comes again counts by itself."""
        found: dict[int | None, float] = {}
        for i, r in enumerate(r for r in self.runs if r.counts):
            found[r.seed if r.seed not in found else -1 - i] = float(r.result["best_val_loss"])
        return found

    @property
    def mean(self) -> float | None:
        """Of the losses; None without any."""
        return spread([*self.losses.values()])[0] if self.losses else None

    @property
    def sigma(self) -> float | None:
        """Of the losses; None with fewer than two."""
        return spread([*self.losses.values()])[1] if self.losses else None

    @property
    def whole(self) -> bool:
        """Whether every run of it ended well: a group with a diverged run cannot be the best."""
        return all(r.counts for r in self.runs)


@dataclass(frozen=True)
class Comparison:
    """A group against another one."""

    group: Group
    other: Group
    difference: Difference | None
    """Of the mean losses; None where one has none."""
    p: float | None
    """Corrected by Holm's method for the comparisons beside it."""

    @property
    def apart(self) -> bool:
        """Whether two seeds alone keep a difference far above their spread from being significant."""
        sigmas = [g.sigma for g in (self.group, self.other) if g.sigma is not None]
        few = min(len(self.group.losses), len(self.other.losses)) == 2
        return few and self.difference is not None and abs(self.difference.mean) > FAR * max(sigmas, default=0.0)

    @property
    def verdict(self) -> str:
        """In words."""
        if self.difference is None:
            return "no loss to compare"
        if self.p is None:
            return "one seed: significance cannot be told"
        if self.p >= LEVEL:
            return FEW_SEEDS if self.apart else "not distinguishable"
        return "better" if self.difference.mean < 0 else "worse"


def differing(runs: Sequence[Run]) -> dict[str, list[Value | None]]:
    """Fields in which the runs' configs differ, with each run's value; None where a config does not know it.

    Left out: where files are; and `min_lr`, where it is the same share of the rate in all of them.
    """
    told = [r for r in runs if r.resolved] or runs  # else the planned value `auto` would differ from what it became
    names = dict.fromkeys(n for r in told for n in r.config)
    out: dict[str, list[Value | None]] = {}
    for name in names:
        if SECTION_OF.get(name) == "output" and name != "preset":
            continue
        values = [r.config.get(name) for r in runs]
        known = [r.config.get(name) for r in told if r.config]  # an unreadable config tells nothing
        if any(v != known[0] for v in known) or _planned(name, values, runs):
            out[name] = values
    if "lr" in out and "min_lr" in out:
        shares = {
            round(float(m) / float(lr), 9)
            for m, lr in zip(out["min_lr"], out["lr"], strict=True)
            if isinstance(m, int | float) and isinstance(lr, int | float) and lr
        }
        if len(shares) == 1:
            del out["min_lr"]
    return out


def _planned(name: str, values: Sequence[Value | None], runs: Sequence[Run]) -> bool:
    """Whether a field differs that a sweep changes, though the run with another value has not begun."""
    changed = any(name in r.changes for r in runs)
    known = [v for v, r in zip(values, runs, strict=True) if r.config]
    return changed and any(v != known[0] for v in known)


def grouped(runs: Sequence[Run]) -> list[Group]:
    """The runs in groups, in the order of their first runs; each run is told its group's name.

    Runs of a sweep are grouped by what the sweep says that they change, others by their configs.
    """
    fields = {n: v for n, v in differing(runs).items() if n not in UNTOLD}
    sweeps = list(dict.fromkeys(r.asked.folder.resolve() for r in runs if r.asked))
    keys: dict[object, list[int]] = {}
    for i, run in enumerate(runs):
        if run.asked and (run.changes or run.variant):
            changed = tuple((k, v) for k, v in run.changes.items() if k != "seed")
            key: object = (run.asked.folder.resolve(), run.variant, changed)
        elif run.config:
            key = (None, *(v[i] for v in fields.values()))
        else:
            key = (None, i)
        keys.setdefault(key, []).append(i)
    groups = []
    for members in keys.values():
        first = runs[members[0]]
        changes = {n: v for n, values in fields.items() if (v := values[members[0]]) is not None}
        own = {k: v for k, v in first.changes.items() if k != "seed"}
        if first.asked and (first.changes or first.variant):
            name = first.variant or exact_name(own, None)
            if first.variant:
                axes = _axes(first, runs)
                name = exact_name({k: v for k, v in own.items() if k in axes}, first.variant)
            if len(sweeps) > 1:
                name = f"{first.asked.folder.resolve().name}: {name}"
        elif len(members) == 1:
            name = first.name
        else:
            name = ", ".join(f"{k}={short(v)}" for k, v in changes.items()) or first.name
        groups.append(Group(name, [runs[i] for i in members], changes))
    _tell_apart(groups)
    for group in groups:
        for run in group.runs:
            run.group = group.name
    return groups


def _axes(run: Run, runs: Sequence[Run]) -> set[str]:
    """Fields that differ between runs of the same variant: axes, not the variant's own fields."""
    same = [r.changes for r in runs if r.asked == run.asked and r.variant == run.variant]
    return {k for c in same for k in c if k != "seed" and any(o.get(k) != c[k] for o in same)}


def _tell_apart(groups: Sequence[Group]) -> None:
    seen: dict[str, int] = {}
    for group in groups:
        seen[group.name] = seen.get(group.name, 0) + 1
        if seen[group.name] > 1:
            group.name += f" ({seen[group.name]})"


def find_baseline(groups: Sequence[Group], wanted: str, runs: Sequence[Run]) -> Group | None:
    """The group that the others are compared with: the wanted one, else the sweep's own; None: there is none.

    Raises:
        ConfigError: no group or run has the name; says the nearest.
    """
    names = {g.name: g for g in groups} | {r.name: g for g in reversed(groups) for r in g.runs}
    if wanted:
        if wanted not in names:
            meant = nearest(wanted, names)
            hint = f"did you mean {meant}?" if meant else f"expected one of {', '.join(g.name for g in groups[:12])}"
            raise ConfigError(f"--baseline: found {wanted}; {hint}")
        return names[wanted]
    told = dict.fromkeys(r.asked.baseline for r in runs if r.asked and r.asked.baseline)
    return next((names[n] for n in told if n in names), None)


def compare(groups: Sequence[Group], other: Group, *, chosen: bool = False) -> list[Comparison]:
    """Each group against `other`, which is left out; p-values corrected for how many there are.

    Args:
        groups: all of them.
        other: what they are compared with.
        chosen: it was chosen by the same losses, as the best one is: then any pair of groups might have been the one
            that is looked at, and the correction is for all pairs.
    """
    rest = [g for g in groups if g is not other]
    differences = [_difference(g, other) for g in rest]
    count = sum(bool(g.losses) for g in groups)
    ps = holm([d.p if d else None for d in differences], of=count * (count - 1) // 2 if chosen else 0)
    return [Comparison(g, other, d, p) for g, d, p in zip(rest, differences, ps, strict=True)]


def _difference(one: Group, other: Group) -> Difference | None:
    a, b = one.losses, other.losses
    if not a or not b:
        return None
    if set(a) == set(b) and None not in a:
        return paired([a[s] for s in a], [b[s] for s in a])
    return welch([*a.values()], [*b.values()])


def best_group(groups: Sequence[Group]) -> Group | None:
    """The group of lowest mean loss among those of which every run ended well; None: there is none."""
    ranked = [(g.mean, i, g) for i, g in enumerate(groups) if g.mean is not None and g.whole]
    return min(ranked)[2] if ranked else None


# --- the answer ---------------------------------------------------------------------------------------------------


def answer(groups: Sequence[Group], baseline: Group | None) -> str:
    """What the numbers say, in a sentence or two."""
    runs = [r for g in groups for r in g.runs]
    best = best_group(groups)
    if best is None:
        return _no_best(runs)
    if len(groups) == 1:
        return _alone(best)
    said = f"{best.name} has the lowest validation loss, {_loss(best)}"
    against = compare(groups, best, chosen=True)
    known = [c for c in against if c.difference is not None]
    if not known:
        return said + "; no other run ended with one." + _left_out(runs)
    if all(c.p is None for c in known):
        above = [c for c in known if c.difference and c.difference.mean >= 0]
        if not above:
            return said + "; no other one ended well." + _left_out(runs)
        next_best = min(above, key=lambda c: c.difference.mean if c.difference else 0.0)
        margin = next_best.difference.mean if next_best.difference else 0.0
        said += (
            f", {margin:.4f} below {next_best.group.name}; with one seed on a side, whether that is more than chance "
        )
        return said + "cannot be told." + _left_out(runs)
    if baseline is not None and baseline is not best and baseline.mean is not None:
        of = next(c for c in against if c.group is baseline)
        margin = of.difference.mean if of.difference else 0.0
        how = {"not distinguishable": "not distinguishable from it", FEW_SEEDS: FEW_SEEDS}.get(of.verdict) or _p(of.p)
        said += f", {margin:.4f} below the baseline {baseline.name} ({how})"
    elif baseline is best:
        said += " and is the baseline"
    below = [c.group for c in known if c.difference and c.difference.mean < 0]  # not ranked, see `whole`
    known = [c for c in known if c.group not in below]
    others = [c for c in known if c.group is not baseline]
    same = [c.group.name for c in others if c.verdict == "not distinguishable"]
    few = [c.group.name for c in others if c.verdict == FEW_SEEDS]
    untold = [c.group.name for c in others if c.p is None]
    if others and not same and not few and not untold:
        more = "every other ranked one" if below else "every other one"
        said += f"; {more} is worse by more than chance explains"
    if same:
        said += f"; it is not distinguishable from {_listed(same)}"
    if few:
        said += f"; two seeds are too few to confirm the distance to {_listed(few)}"
    if untold:
        said += f"; with one seed, nothing can be told of {_listed(untold)}"
    if below:
        said += (
            f"; lower so far, but not all of its runs ended well: {_listed([f'{g.name}, {_loss(g)}' for g in below])}"
        )
    return said + "." + _left_out(runs)


def _p(p: float | None) -> str:
    return "significance cannot be told" if p is None else f"p = {p:.2g}"


def _loss(group: Group) -> str:
    count, sigma = len(group.losses), group.sigma
    mean = group.mean if group.mean is not None else float("nan")
    return f"{mean:.4f}" if sigma is None else f"{mean:.4f} ± {sigma:.4f} (σ over {count} seeds)"


def _alone(group: Group) -> str:
    if len(group.runs) > 1:
        return f"{group.name} ends at a validation loss of {_loss(group)}."
    run = group.runs[0]
    step, end = run.number("best_step"), run.stability.end if run.stability else "too short to tell"
    at = f" at step {step:,.0f}" if step is not None else ""
    heading = "" if end == "too short to tell" else f"; its training loss is {end} at the end"
    heading = heading.replace("is converged", "has converged")
    return f"{run.name} reaches a validation loss of {group.mean:.4f}{at}{heading}."


def _no_best(runs: Sequence[Run]) -> str:
    seen = [r for r in runs if r.number("best_val_loss") is not None]
    if not seen:
        return "No run has a validation loss, so none can be called best." + _left_out(runs)
    low = min(seen, key=lambda r: float(r.result["best_val_loss"]))
    return (
        f"No group of runs ended well as a whole, so none can be called best; the lowest validation loss seen is "
        f"{low.result['best_val_loss']:.4f}, of {low.name} ({low.status})."
    )


def _left_out(runs: Sequence[Run]) -> str:
    others: dict[str, int] = {}
    for run in runs:
        if not run.counts:
            what = run.status if run.status not in ("completed", "early_stopped") else "without validation"
            others[what] = others.get(what, 0) + 1
    if not others or len(runs) == 1:
        return ""
    return f" Not ranked: {', '.join(f'{n} {what}' for what, n in others.items())} (of {len(runs)} runs)."


def _listed(names: Sequence[str], most: int = 4) -> str:
    shown = [*names[:most], f"{len(names) - most} others"] if len(names) > most + 1 else [*names]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def question(groups: Sequence[Group], asked: Mapping[str, None]) -> str:
    """What the runs were made for: the sweeps' questions, else what differs between the runs."""
    if asked:
        return " ".join(asked)
    fields = list(dict.fromkeys(k for g in groups for k in g.changes))
    if len(groups) == 1:
        return f"What came of {groups[0].name}?"
    return (
        f"Which of {len(groups)} is better? They differ in {_listed(fields, 6)}." if fields else "How do they compare?"
    )
