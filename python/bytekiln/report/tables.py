"""The page's tables. In: a `Report`. Out: HTML, every text of a run escaped. Called by `report.html`; no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from bytekiln.config import UNLIMITED_STEPS
from bytekiln.console import human_time
from bytekiln.report.groups import Comparison, differing
from bytekiln.report.model import Report
from bytekiln.report.runs import Run
from bytekiln.report.stability import spread
from bytekiln.section import Value
from bytekiln.sweep.axes import short

FIELD_COLUMNS, LONG_NAME = 10, 110
"""Differing fields that the table of runs shows at most; characters of HTML of a first cell that wraps: a swatch and
about 50 of a name."""
Cell = tuple[str, float | None, str]
"""(HTML, number to sort by or None, class)."""


def _table(name: str, heads: Sequence[tuple[str, str, str]], rows: Iterable[tuple[str, str, Sequence[Cell]]]) -> str:
    """A table that sorts.

    Args:
        name: what screen readers call it.
        heads: (HTML, what it means, class) a column.
        rows: (HTML of the first cell, class of the row, other cells).
    """
    top = "".join(
        f'<th scope="col" aria-sort="none" class="{c}"><button type="button" class="sort" title="{escape(what)}">{h}'
        "</button></th>"
        for h, what, c in heads
    )
    body = []
    for first, kind, cells in rows:
        tds = "".join(
            f'<td class="{c}"'
            + (f' data-v="{"" if v is None else repr(v)}"' if "n" in c.split() else "")
            + f">{text}</td>"
            for text, v, c in cells
        )
        long = ' class="long"' if len(first) > LONG_NAME else ""
        body.append(f'<tr class="{kind}"><th scope="row"{long}>{first}</th>{tds}</tr>')
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}"><table><caption class="sr">'
        f"{escape(name)}</caption><thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table></div>\n"
    )


def _number(value: float | None, form: str = ".4f") -> Cell:
    return ("—", None, "n") if value is None else (format(value, form), float(f"{value:.10g}"), "n")


def swatch(number: int) -> str:
    """A small square in a group's colour."""
    return f'<span class="sw" style="--c:var(--g{number})"></span>'


def shown_fields(runs: Sequence[Run]) -> list[str]:
    """Fields that the table has a column for: those that differ, the runs' own changes first."""
    fields = [n for n in differing(runs) if n != "preset" or len(differing(runs)) <= 2]
    own = dict.fromkeys(k for r in runs for k in r.changes)
    ordered = [n for n in own if n in fields] + [n for n in fields if n not in own]
    return ordered[:FIELD_COLUMNS]


def runs_table(report: Report) -> str:
    """The runs: differing fields, how they ended, losses."""
    fields = shown_fields(report.runs)
    more = len(differing(report.runs)) - len(fields)
    has = {n: any(r.number(n) is not None for r in report.runs) for n in ("final_bits_per_byte", "final_val_accuracy")}
    noted = any(r.notes or _reason(r) for r in report.runs)
    heads = [("run", "the run’s name", ""), *((escape(n), "a field in which the runs differ", "n") for n in fields)]
    heads += [
        ("status", "how it ended", ""),
        ("best val", "lowest validation loss, nats a token", "n"),
        ("at step", "step of the lowest validation loss", "n"),
        ("final val", "last validation loss", "n"),
        ("train", "training loss of the last step", "n"),
        ("gap", "last validation loss minus the loss on training data in evaluation mode", "n"),
    ]
    heads += [("bits/byte", "last validation loss in bits a byte of text", "n")] * has["final_bits_per_byte"]
    heads += [("accuracy", "share of validation tokens guessed right", "n")] * has["final_val_accuracy"]
    heads += [
        ("steps", "steps done", "n"),
        ("tokens/s", "tokens a second", "n"),
        ("time", "time spent on the run", "n"),
    ]
    heads += [("note", "what else is to be known", "words")] * noted
    best = min((r for r in report.runs if r.counts), key=lambda r: float(r.result["best_val_loss"]), default=None)
    rows = []
    for i, group in enumerate(report.groups):
        for run in group.runs:
            cells: list[Cell] = [_field(run.config.get(n)) for n in fields]
            cells.append(
                (f'<span class="status {escape(run.status)}">{escape(run.status.replace("_", " "))}</span>', None, "")
            )
            train, val = run.number("final_train_eval_loss"), run.number("final_val_loss")
            cells += [
                _number(run.number("best_val_loss")),
                _number(run.number("best_step"), ",.0f"),
                _number(val),
                _number(run.number("final_train_loss")),
                _number(None if train is None or val is None else val - train, "+.4f"),
            ]
            cells += [_number(run.number("final_bits_per_byte"))] * has["final_bits_per_byte"]
            cells += [_number(run.number("final_val_accuracy"))] * has["final_val_accuracy"]
            spent = run.number("wall_time_s") or run.number("elapsed_time")
            steps = run.number("steps") or float(run.steps)
            limit = run.number("max_steps") or 0
            of = f" of {limit:,.0f}" if steps < limit < UNLIMITED_STEPS else ""
            cells += [
                (f"{steps:,.0f}{of}", steps, "n"),
                _number(run.number("tokens_per_s"), ",.0f"),
                ("—", None, "n") if spent is None else (escape(human_time(spent)), spent, "n"),
            ]
            if noted:
                cells.append((escape("; ".join([*_reason(run), *run.notes])), None, "words"))
            rows.append((swatch(i) + escape(run.name), "best" if run is best else "", cells))
    beyond = (
        f'<p class="note">{more} further fields differ; they are in the configurations below.</p>' if more > 0 else ""
    )
    return f"<h2>Runs</h2>\n{_table('runs', heads, rows)}{beyond}"


def _reason(run: Run) -> list[str]:
    return [run.why] if run.why and run.status not in ("completed",) else []


def _field(value: Value | None) -> Cell:
    if value is None:
        return "—", None, "n"
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    text = short(value)
    return escape(text if len(text) <= 40 else f"…{text[-39:]}"), number, "n" if number is not None else "n text"


def comparisons_table(report: Report) -> str:
    """Variants against the baseline, over seeds."""
    if len(report.groups) < 2:
        return ""
    base = report.baseline
    by_group = {id(c.group): c for c in report.comparisons}
    heads = [
        ("variant", "runs that differ in nothing but the seed", ""),
        ("runs", "runs that ended well, of all", "n"),
        ("mean best val", "mean of the lowest validation losses, nats a token", "n"),
        ("σ over seeds", "standard deviation between seeds", "n"),
    ]
    if base:
        heads += [
            ("Δ", "mean difference to the baseline", "n"),
            ("95 % interval", "of the difference", ""),
            ("p", "two-sided, corrected by Holm’s method", "n"),
            ("test", "paired: by equal seeds; welch: independent samples", ""),
            ("verdict", "at the level 0.05", ""),
        ]
    rows = []
    for i, g in enumerate(report.groups):
        cells: list[Cell] = [
            (f"{len(g.losses)} of {len(g.runs)}", float(len(g.losses)), "n"),
            _number(g.mean),
            _number(g.sigma),
        ]
        if base:
            cells += _compared(by_group.get(id(g)))
        rows.append((swatch(i) + escape(g.name), "best" if g is report.best else "", cells))
    note = "Compared are the lowest validation losses of runs that ended well. "
    if base is None:
        note += "No baseline is named; --baseline NAME takes one."
    else:
        note += (
            f"Baseline: {base.name}. Variants with the same seeds are compared seed by seed (paired t), others by "
            f"Welch’s t; p is corrected for {sum(c.p is not None for c in report.comparisons)} comparisons (Holm)."
        )
        seeds = [len(g.losses) for g in report.groups if g.losses]
        if min(seeds, default=0) == 2:
            note += " With two seeds only large differences can be told from chance; a third one tells much more."
        if all(c.p is None for c in report.comparisons):
            note += " With one seed a variant, significance cannot be told."
    return f'<h2>Differences</h2>\n<p class="note">{escape(note)}</p>\n{_table("differences", heads, rows)}'


def _compared(c: Comparison | None) -> list[Cell]:
    if c is None:
        return [("—", 0.0, "n"), ("", None, ""), ("—", None, "n"), ("", None, ""), ("baseline", None, "")]
    d = c.difference
    interval = f"{d.low:+.4f} to {d.high:+.4f}" if d and d.low is not None and d.high is not None else "—"
    kind = c.verdict if c.verdict in ("better", "worse") else ""
    return [
        _number(d.mean if d else None, "+.4f"),
        (interval, None, ""),
        _number(c.p, ".2g"),
        (escape(d.how if d and d.p is not None else "—"), None, ""),
        (f'<span class="{kind}">{escape(c.verdict)}</span>', None, ""),
    ]


def stability_table(report: Report) -> str:
    """The numbers of stability, a run a row."""
    judged = [(i, r) for i, g in enumerate(report.groups) for r in g.runs if r.stability]
    if not judged:
        return ""
    heads = [
        ("run", "the run’s name", ""),
        ("spikes", "stretches of steps above 3 σ of the detrended training loss", "n"),
        ("by chance", "how many of them noise alone would make", "n"),
        ("highest", "in σ above the trend", "n"),
        ("at step", "of the highest", "n"),
        ("σ", "of the detrended training loss, nats a token", "n"),
        ("largest gradient", "norm before clipping", "n"),
        ("at step", "of the largest gradient", "n"),
        ("slope", "of the training loss over the last 10 %, nats a token per 1,000 steps", "n"),
        ("end", "converged, still falling, oscillating", ""),
    ]
    rows = []
    for i, run in judged:
        s = run.stability
        if s is None:
            continue
        slope = ("—", None, "n") if s.slope is None else (f"{s.slope:+.3g} ± {s.slope_error or 0:.1g}", s.slope, "n")
        cells: list[Cell] = [
            (f"{s.spikes:,}", float(s.spikes), "n"),
            _number(s.expected_spikes, ".1f"),
            _number(s.highest, ".1f"),
            _number(None if s.highest_step is None else float(s.highest_step), ",.0f"),
            _number(s.sigma),
            _number(s.largest_grad_norm, ".3g"),
            _number(None if s.largest_grad_step is None else float(s.largest_grad_step), ",.0f"),
            slope,
            (escape(s.end), None, ""),
        ]
        rows.append((swatch(i) + escape(run.name), "", cells))
    over_seeds = []
    for g in report.groups:
        if g.sigma is not None:
            norms = [
                r.stability.largest_grad_norm
                for r in g.runs
                if r.stability and r.stability.largest_grad_norm is not None
            ]
            more = f", largest gradient norm {spread(norms)[0]:.3g} in the mean" if norms else ""
            over_seeds.append(f"{g.name}: σ over {len(g.losses)} seeds {g.sigma:.4f}{more}")
    seeds = f'<p class="note">{escape("; ".join(over_seeds[:20]))}.</p>' if over_seeds else ""
    return f"<h2>Stability</h2>\n{_table('stability', heads, rows)}{seeds}"
