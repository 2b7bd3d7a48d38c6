"""Parts of an analysis that only some sweeps have: divergence, batch sizes, runs that should coincide, over-fitting,
schedules, sizes, texts. In: the variants' `Facts`. Out: Markdown, empty where a part makes no sense. No torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from bytekiln.config import SECTION_OF
from bytekiln.report.facts import Facts, divergence, listed, mean, ranked, several, told
from bytekiln.report.groups import differing
from bytekiln.report.runs import Run
from bytekiln.sweep.axes import short

BEGINNING, END = 0.05, 0.1
"""Shares of a run over which schedules are compared: the first 100 and the last 200 of 2,000 steps."""
ROUNDING = 1e-3
"""Two curves that lie closer than this (nats a token) differ by rounding, which grows from step to step."""
OVER, APART = 0.02, 0.25
"""A validation loss that has risen by the first share from its lowest, or lies by the second one above that on training
data, tells of over-fitting."""
BATCH = ("batch_size", "grad_accum_steps", "num_eval_batches")
"""Fields in which runs differ that should coincide; an evaluation is a number of batches."""
SCHEDULE = ("warmup_steps", "warmup_rule", "warmup_fraction", "decay_lr", "decay_steps", "decay_fraction", "schedule")
SHAPE = ("num_layers", "d_model")


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; its first column holds names, the others numbers."""
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join(lines)


def changed_fields(facts: Sequence[Facts]) -> set[str]:
    """Fields in which the runs differ."""
    return set(differing([r for f in facts for r in f.runs]))


def stability(facts: Sequence[Facts]) -> str:
    """Which runs diverged and when, the numbers of stability, and which variant each of them calls the most stable."""
    lost = [f for f in facts if f.diverged]
    if len(facts) < 2:
        return ""
    parts = []
    if lost:
        heading = f"{len(lost)} of {len(facts)} variants diverged."
        parts.append("\n".join([heading, *(f"- {f.name}: {divergence(f)} ({_why(f.diverged[0])})" for f in lost)]))
        held = [f.field("lr") for f in facts if f.ended and not f.diverged]
        above = [f.field("lr") for f in lost if not held or f.field("lr") > max(held)]
        if "lr" in changed_fields(facts) and held and above:
            low, high = short(max(held)), short(min(above))
            parts.append(f"The largest rate that trained is {low}, the next one is {high}: the limit lies in between.")
    elif "lr" in changed_fields(facts):
        parts.append("None diverged.")
    heads = ["run", "spikes", "by chance", "σ of the loss", "largest gradient norm"]
    numbers = [("spikes", ".3g"), ("expected_spikes", ".1f"), ("sigma", ".4f"), ("largest_grad_norm", ".3g")]
    seeds = any(f.group.sigma is not None for f in facts)
    rows = []
    for f in facts:
        known = f.stable("sigma") is not None  # else too short a run to have a trend
        cells = [told(f.stable(n) if known or n == "largest_grad_norm" else None, form) for n, form in numbers]
        rows.append([f.name, *cells, *([told(f.group.sigma)] if seeds else [])])
    parts.append(markdown([*heads, "σ over seeds"] if seeds else heads, rows))
    named = []
    for what, key in (
        ("fewest spikes beyond chance", _spikes_beyond_chance),
        ("smallest gradient norm at its largest", lambda f: f.stable("largest_grad_norm")),
        ("smallest σ over seeds", lambda f: f.group.sigma),
    ):
        if calm := ranked(facts, key):
            named.append((calm[0].name, what))
    if len({name for name, _ in named}) == 1:
        parts.append(f"Most stable by each of these numbers: {named[0][0]}.")
    elif named:
        parts.append(f"Most stable: {'; '.join(f'{name} ({what})' for name, what in named)}.")
    if best := ranked(facts, lambda f: f.group.mean):
        parts[-1] += f" Lowest loss: {best[0].name}, {told(best[0].group.mean)}."
    return "\n\n".join(parts)


def _spikes_beyond_chance(facts: Facts) -> float | None:
    spikes, chance = facts.stable("spikes"), facts.stable("expected_spikes")
    return None if spikes is None or chance is None else max(0.0, spikes - chance)


def _why(run: Run) -> str:
    why = run.why.partition(": ")[2] or run.why
    return why.partition("; expected")[0] or "no reason is told"


def batches(facts: Sequence[Facts]) -> str:
    """Losses of batch sizes at the same step and at the same tokens, steps and tokens a second."""
    if len({f.sequences for f in facts}) < 2 or "batch_size" not in changed_fields(facts):
        return ""
    known = [f for f in facts if f.ended and "val_loss" in f.ended[0].curves]
    if len(known) < 2:
        return ""
    step = min(r.steps for f in known for r in f.ended)
    tokens = min(t for f in known if (t := f.number("tokens")) is not None)
    rows, at_step, at_tokens = [], {}, {}
    for f in known:
        each = (f.number("tokens") or 0.0) / max(mean([float(r.steps) for r in f.ended]) or 1.0, 1.0)
        at_step[f.name], at_tokens[f.name] = _validation_at(f, step), _validation_at(f, tokens / max(each, 1.0))
        speed = f.number("tokens_per_s")
        rows.append((f.name, f"{f.sequences:,.0f}", told(speed and speed / each, ".3g"), told(speed, ",.0f"),
                     told(at_step[f.name]), told(at_tokens[f.name]), several(_spikes(f), ".3g")))  # fmt: skip
    heads = ("run", "sequences a step", "steps/s", "tokens/s", f"val at step {step:,}", f"val at {tokens:,.0f} tokens",
             "spikes")  # fmt: skip
    fastest = max(known, key=lambda f: f.number("tokens_per_s") or 0.0)
    said = [f"{fastest.name} reads most tokens a second, {told(fastest.number('tokens_per_s'), ',.0f')}."]
    for where, found in (("step", at_step), ("number of tokens", at_tokens)):
        seen = {n: v for n, v in found.items() if v is not None}
        if seen:
            low = min(seen, key=lambda n: seen[n])
            said.append(f"At the same {where} {low} has the lowest validation loss, {seen[low]:.4f}.")
    caveat = (
        "At the same step a larger batch has read more text. At the same tokens it has made fewer updates, and its "
        "schedule stands earlier, so that a run planned for so many tokens would end lower."
    )
    return f"{markdown(heads, rows)}\n\n{' '.join(said)} {caveat}"


def _spikes(facts: Facts) -> list[float]:
    return [float(r.stability.spikes) for r in facts.runs if r.stability]


def _validation_at(facts: Facts, step: float) -> float | None:
    curves = [c for r in facts.ended if (c := r.curves.get("val_loss")) is not None and c.x[-1] >= step - 1e-6]
    return mean([float(np.interp(step, c.x, c.y)) for c in curves])


def coinciding(facts: Sequence[Facts]) -> str:
    """Variants of the same effective batch, all else equal: how far apart their training losses ever are."""
    lines = []
    for one, other in itertools.combinations(facts, 2):
        if one.sequences != other.sequences or not _equal_but_for_accumulation(one.runs[0], other.runs[0]):
            continue
        widest, at, last, together = 0.0, 0, 0, 10**12
        for a in one.traces:
            for b in other.traces:
                if a.run.seed != b.run.seed:
                    continue
                steps, i, k = np.intersect1d(a.steps, b.steps, return_indices=True)
                apart = np.abs(a.losses[i] - b.losses[k])
                beyond = steps[apart >= ROUNDING]
                together = min(together, int(beyond[0]) - 1 if len(beyond) else together)
                if len(steps) and (not last or apart.max() > widest):
                    widest, at, last = float(apart.max()), int(steps[apart.argmax()]), int(steps[-1])
        if not last:
            continue
        ways = [f"{f.field('batch_size'):.0f} × {max(f.field('grad_accum_steps'), 1):.0f}" for f in (one, other)]
        noise, dropout = one.stable("sigma"), one.field("dropout")
        if widest < ROUNDING:
            meaning = "they coincide, but for rounding"
        elif dropout:
            meaning = f"their dropout masks ({dropout:g}) are drawn a micro-step and differ"
        elif together > 0:
            rounding = f"what {one.runs[0].config.get('precision')} rounds has grown"
            meaning = f"up to step {together:,} they lie within {ROUNDING:g}, from there on {rounding}"
        else:
            meaning = "more than rounding explains, from the first step on"
        against = f"; single steps scatter by σ = {noise:.4f}" if noise else ""
        lines.append(
            f"- {one.name} ({ways[0]}) and {other.name} ({ways[1]}): both {one.sequences:.0f} sequences a step. The "
            f"largest difference of their training losses in {last:,} steps is {widest:.2g}, at step {at:,}: {meaning}"
            f"{against}.{_price(one, other)}"
        )
    return "\n".join(lines)


def _equal_but_for_accumulation(one: Run, other: Run) -> bool:
    def rest(run: Run) -> dict[str, object]:
        return {k: v for k, v in run.config.items() if k not in (*BATCH, "seed") and SECTION_OF.get(k) != "output"}

    return bool(one.config) and rest(one) == rest(other) and one.config.get("batch_size") != other.config["batch_size"]


def _price(one: Facts, other: Facts) -> str:
    finals = [f.number("final_val_loss") for f in (one, other)]
    speeds = [f.number("tokens_per_s") for f in (one, other)]
    said = ""
    if finals[0] is not None and finals[1] is not None:
        said += f" Final validation losses: {finals[0]:.4f} and {finals[1]:.4f}."
    if speeds[0] and speeds[1]:
        said += f" {other.name} reads {speeds[1] / speeds[0]:.2f} times as many tokens a second."
    return said


def overfitting(facts: Sequence[Facts]) -> str:
    """Training against validation loss, where regularisation differs or a run's validation loss rises."""
    seen = [f for f in facts if f.gap is not None]
    risen = {f.name: r for f in seen if (r := _risen(f)) is not None}
    over = [f for f in seen if risen.get(f.name, 0.0) > OVER * (f.group.mean or math.inf) or _wide(f)]
    if not seen or not (over or {"dropout", "weight_decay"} & changed_fields(facts)):
        return ""
    heads = ("run", "train (evaluated)", "validation", "gap", "lowest validation", "at step", "risen since")
    rows = [(f.name, told(f.number("final_train_eval_loss")), told(f.number("final_val_loss")), told(f.gap, "+.4f"),
             told(f.number("best_val_loss")), told(f.number("best_step"), ",.0f"), told(risen.get(f.name), "+.4f"))
            for f in seen]  # fmt: skip
    said = [
        f"{f.name} over-fits: from step {f.number('best_step') or 0:,.0f} on its validation loss rises by "
        f"{risen.get(f.name, 0.0):.4f}, and ends {f.gap or 0:.4f} above that on training data."
        for f in over
    ] or [
        f"No validation loss rises by more than {100 * OVER:.0f} % from its lowest or ends more than "
        f"{100 * APART:.0f} % above that on training data: none over-fits in these steps."
    ]
    small, large = (pick(seen, key=lambda f: f.gap or 0.0) for pick in (min, max))
    if small is not large:
        said.append(f"The gap is smallest with {small.name}, {small.gap:+.4f}, and largest with {large.name}, "
                    f"{large.gap:+.4f}.")  # fmt: skip
    return f"{markdown(heads, rows)}\n\n{' '.join(said)}"


def _wide(facts: Facts) -> bool:
    train = facts.number("final_train_eval_loss")
    return facts.gap is not None and train is not None and facts.gap > APART * train


def _risen(facts: Facts) -> float | None:
    final, best = facts.number("final_val_loss"), facts.number("best_val_loss")
    return None if final is None or best is None else final - best


def schedules(facts: Sequence[Facts]) -> str:
    """What the loss did in the beginning and at the end, where schedules differ."""
    fields = changed_fields(facts)
    if not fields & set(SCHEDULE):
        return ""
    steps = min((r.steps for f in facts for r in f.ended), default=0)
    first, last = round(BEGINNING * steps), round(END * steps)
    if first < 5:
        return ""
    rows, falls, ends = [], {}, {}
    for f in facts:
        if fall := f.fall(first):
            falls[f.name] = -fall
        if (change := _change_at_end(f, steps, last)) is not None:
            ends[f.name] = change
        rows.append((f.name, _rates(f, 1, first), told(falls.get(f.name), "+.4f"), _rates(f, steps - last, steps),
                     told(ends.get(f.name), "+.4f"), told(f.number("final_val_loss"))))  # fmt: skip
    heads = ("run", f"rate, steps 1 to {first:,}", f"loss, first {first:,} steps",
             f"rate, last {last:,} steps", f"loss, last {last:,} steps, halves", "final validation")  # fmt: skip
    said = []
    if falls:
        low = min(falls, key=lambda n: falls[n])
        said.append(f"In the first {first:,} steps the loss falls most with {low}, {falls[low]:+.4f}.")
    if ends:
        low = min(ends, key=lambda n: ends[n])
        said.append(f"In the last {last:,} it falls most with {low}, {ends[low]:+.4f}.")
    return f"{markdown(heads, rows)}\n\n{' '.join(said)}".strip()


def _change_at_end(facts: Facts, steps: int, last: int) -> float | None:
    """Training loss of the last steps minus that of as many before: half of `last` each, to even out the noise."""
    half = max(5, last // 2)
    changes = []
    for t in facts.traces:
        after, before = t.level(steps - half, steps), t.level(steps - 2 * half, steps - half)
        if after is not None and before is not None:
            changes.append(after - before)
    return mean(changes)


def _rates(facts: Facts, low: int, high: int) -> str:
    curve = facts.runs[0].curves.get("lr")
    if curve is None or curve.x[-1] < high:
        return "—"
    a, b = (float(np.interp(s, curve.x, curve.y)) for s in (low, high))
    return f"{a:.2g}" if math.isclose(a, b, rel_tol=0.01) else f"{a:.2g} to {b:.2g}"


def sizes(facts: Sequence[Facts]) -> str:
    """Exact parameters, loss, time; what a doubling brings, where shapes differ."""
    known = sorted((n, i, f) for i, f in enumerate(facts) if (n := f.number("parameters")))
    if len({n for n, _, _ in known}) < 2 or not changed_fields(facts) & set(SHAPE):
        return ""
    rows: list[tuple[str, ...]] = []
    before: tuple[float, float] | None = None
    said = []
    for size, _, f in known:
        loss, doubling = f.group.mean, None
        if before is not None and loss is not None and size > before[0]:
            doubling = (loss - before[1]) / math.log2(size / before[0])
        if loss is not None:
            before = (size, loss)
        speed = f.number("tokens_per_s")
        rows.append((f.name, f"{f.field('num_layers'):.0f} × {f.field('d_model'):.0f}", f"{size:,.0f}", told(loss),
                     told(doubling, "+.4f"), told(speed, ",.0f"),
                     told(f.number("wall_time_s"), ",.0f")))  # fmt: skip
    heads = ("run", "layers × width", "parameters", "best validation", "Δ a doubling", "tokens/s", "seconds")
    gains = [(rows[i][0], rows[i - 1][0], rows[i][4]) for i in range(1, len(rows)) if rows[i][4] != "—"]
    if len(gains) > 1:
        told_gains = [f"{gain} from {low} to {high}" for high, low, gain in gains]
        said.append(f"A doubling of the parameters changes the best validation loss by {listed(told_gains)}.")
        numbers = [float(g) for _, _, g in gains]
        if numbers == sorted(numbers):
            said.append("Each further doubling brings less.")
    return f"{markdown(heads, rows)}\n\n{' '.join(said)}".strip()


def texts(facts: Sequence[Facts]) -> str:
    """Losses on different validation texts in units that can be compared."""
    if len({f.runs[0].config.get("val_data") for f in facts}) < 2:
        return ""
    heads = ("run", "vocabulary", "best validation (nats a token)", "of a uniform guess", "bits a byte, end")
    rows = []
    for f in facts:
        vocabulary, loss = f.field("vocab_size"), f.group.mean
        share = loss / math.log(vocabulary) if loss is not None and vocabulary > 1 else None
        rows.append((f.name, f"{vocabulary:,.0f}", told(loss), told(share and 100 * share, ".1f") + " %",
                     several([v for r in f.ended if (v := r.number("final_bits_per_byte")) is not None])))  # fmt: skip
    return (
        f"{markdown(heads, rows)}\n\nThe runs are validated on different texts. A loss a token depends on the "
        "vocabulary; bits a byte do not, but they still tell as much of the text as of the model."
    )
