"""The analysis of a sweep in words, from its numbers: `analysis.md`.

In: a `Report`. Out: Markdown. Called by `report.build`; reads the runs' files once more for the losses of single
steps, and imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from bytekiln.console import human_time
from bytekiln.report import contrasts
from bytekiln.report.facts import (
    ENDED,
    Facts,
    conclusion,
    cost,
    early,
    early_step,
    ending,
    lead_of,
    listed,
    stable,
    statuses,
    told,
    train_against_validation,
    validation,
)
from bytekiln.report.groups import Comparison
from bytekiln.report.model import Report

PARTS: tuple[tuple[str, Callable[[Sequence[Facts]], str]], ...] = (
    ("Stability", contrasts.stability),
    ("Batch size and throughput", contrasts.batches),
    ("Runs that should coincide", contrasts.coinciding),
    ("Over-fitting", contrasts.overfitting),
    ("Schedules", contrasts.schedules),
    ("Size", contrasts.sizes),
    ("Different texts", contrasts.texts),
)
SAMPLE = 200
"""Characters of a sample that are shown."""


def analysis(report: Report) -> str:
    """The whole text.

    Its parts: what was asked and the answers, a table of all variants, the parts that this sweep has, and each variant
    by one template: early fall of the loss, converged or not, stability, losses, gap, cost, conclusion.
    """
    facts = [Facts.of(g) for g in report.groups]
    base = next((f for f in facts if f.group is report.baseline), None)
    comparisons = {id(c.group): c for c in report.comparisons}
    step = early_step(facts)
    parts = [f"# {report.title}: analysis", report.question, f"**{report.answer}**", _partial(facts)]
    parts += [_answers(facts, comparisons), _table(facts)]
    for title, part in PARTS:
        if text := part([f for f in facts if f.begun]):
            parts.append(f"## {title}\n\n{text}")
    parts.append("## Each run" if all(len(f.runs) == 1 for f in facts) else "## Each variant")
    parts += [_template(f, base, comparisons.get(id(f.group)), step) for f in facts]
    parts += [_samples(facts), _fine_print(step, base), _windows(facts)]
    return "\n\n".join(p for p in parts if p) + "\n"


def _partial(facts: Sequence[Facts]) -> str:
    runs = [r for f in facts for r in f.runs]
    rest = [r for r in runs if r.status not in (*ENDED, "diverged")]
    if not rest:
        return ""
    named = listed([f"{r.name} ({r.status})" for r in rest[:6]] + [f"{len(rest) - 6} others"] * (len(rest) > 6))
    return f"Partial: {len(rest)} of {len(runs)} runs have no result that counts: {named}."


def _answers(facts: Sequence[Facts], comparisons: dict[int, Comparison]) -> str:
    lines = []
    for f in facts:
        question, lead = lead_of(f)
        if question and (c := comparisons.get(id(f.group))) is not None:
            lines.append(f"- {question} {_conclusion(f, c, lead)}")
    return "## Answers\n\n" + "\n".join(lines) if lines else ""


def _conclusion(facts: Facts, comparison: Comparison, lead: str) -> str:
    texts = [f.runs[0].config.get("val_data") for f in (comparison.group, comparison.other)]
    if texts[0] == texts[1]:
        return conclusion(facts, comparison, lead)
    bits = [Facts(g, []).number("final_bits_per_byte") for g in (comparison.group, comparison.other)]
    name = comparison.other.name
    if bits[0] is None or bits[1] is None:
        return f"{lead} losses a token are of another text than with {name} and cannot be compared."
    word = "more" if bits[0] > bits[1] else "less"
    return (
        f"{lead} a byte of validation text costs {abs(bits[0] - bits[1]):.4f} bits {word} than with {name} "
        f"({bits[0]:.4f} against {bits[1]:.4f}); the losses a token, {told(comparison.group.mean)} and "
        f"{told(comparison.other.mean)}, are of different texts."
    )


def _table(facts: Sequence[Facts]) -> str:
    heads = ("run", "ended", "best validation", "at step", "final validation", "gap", "steps", "tokens/s", "time")
    rows = []
    for f in facts:
        seconds, steps = f.number("wall_time_s"), sorted({r.steps for r in f.runs})
        sigma = f.group.sigma
        rows.append((
            f.name, _ended(f), told(f.group.mean) + (f" ± {sigma:.4f}" if sigma is not None else ""),
            told(f.number("best_step") if f.validated else None, ",.0f"),
            told(f.number("final_val_loss") if f.validated else None), told(f.gap, "+.4f"),
            f"{steps[0]:,}" + (f" to {steps[-1]:,}" if len(steps) > 1 else ""), told(f.number("tokens_per_s"), ",.0f"),
            human_time(seconds) if seconds else "—",
        ))  # fmt: skip
    return f"## All of them\n\n{contrasts.markdown(heads, rows)}"


def _ended(facts: Facts) -> str:
    found = Counter(r.status.replace("_", " ") for r in facts.runs)
    return next(iter(found)) if len(found) == 1 else ", ".join(f"{n} {name}" for name, n in found.most_common())


def _template(facts: Facts, base: Facts | None, comparison: Comparison | None, step: int) -> str:
    question, lead = lead_of(facts)
    if comparison is not None:
        end = _conclusion(facts, comparison, lead)
    elif facts is base:
        end = "this is the baseline."
    else:
        end = "there is no baseline to compare it with."
    if not facts.begun:
        return f"### {facts.name}\n\nHas made no step: {statuses(facts)}." + "".join(f" {e}." for e in _errors(facts))
    lines = [
        f"### {facts.name}",
        f"{question}\n" if question else "",
        f"- Early fall of the loss: {early(facts, base, step)}",
        f"- Converged: {ending(facts)}",
        f"- Stability: {stable(facts)}",
        f"- Validation loss: {validation(facts)}",
        f"- Training against validation loss: {train_against_validation(facts)}",
        f"- Cost: {cost(facts)}",
        f"- Conclusion: {end}",
    ]
    notes = [n for r in facts.runs for n in r.notes]
    lines += [f"- Note: {n}" for n in dict.fromkeys(notes)]
    return "\n".join([lines[0], "", *(x for x in lines[1:] if x)])


def _errors(facts: Facts) -> list[str]:
    return list(dict.fromkeys(str(e) for r in facts.runs if (e := r.result.get("error"))))


def _samples(facts: Sequence[Facts]) -> str:
    lines = []
    for f in facts:
        run = next((r for r in f.ended if r.samples), None)
        if run is not None:
            prompt, text = run.samples[0]
            cut = " ".join((prompt + text).split())
            lines.append(f"- {f.name}: `{cut[:SAMPLE].replace('`', chr(39))}{'…' if len(cut) > SAMPLE else ''}`")
    head = "## Samples\n\nWhat each model wrote behind the same prompt (in the run's `samples/` there is more)."
    return "\n\n".join([head, "\n".join(lines)]) if lines else ""


def _fine_print(step: int, base: Facts | None) -> str:
    against = f" Fast and slow: by more than 5 % against {base.name}." if base is not None else ""
    return (
        "Losses are in nats a token. The early fall is that of the training loss from the first step to step "
        f"{step:,} (mean of the last tenth before it).{against} Converged, still falling, oscillating and spikes "
        "are measured on the training losses of single steps. Best losses are compared, seed by seed where the seeds "
        "are equal; p is corrected by Holm's method."
    )


def _windows(facts: Sequence[Facts]) -> str:
    """A warning where evaluations read different amounts: `num_eval_batches` counts batches."""
    read = {f.name: f.field("num_eval_batches") * f.field("batch_size") for f in facts}
    if len(set(read.values())) < 2:
        return ""
    said = listed([f"{count:,.0f} with {name}" if count else f"all with {name}" for name, count in read.items()])
    return f"The evaluations read different numbers of windows, {said}: small differences of losses may come from that."
