"""`lr_search.png`: the range test, what was given up, the losses of full runs with the parabola and its interval.

In: a `Search` and, where there is one, its range test. Out: a PNG. Called by `cli_search`; imports no torch.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bytekiln.metrics import write_atomically
from bytekiln.search.plan import ENDED_WELL, rounded
from bytekiln.search.range_test import RangeTest, draw_on
from bytekiln.search.stages import Search
from bytekiln.sweep.axes import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, RED, GREEN, GREY, INK = "#1f5fa8", "#c8502d", "#2f8a57", "#9aa3ad", "#22272e"
APART = 1 / 8
"""Share of the rates' axis that a label takes, its gap included."""
ABOVE = 0.35
"""Losses so far above the best (nats a token, at least) are cut off in the picture of the fit."""


def draw_search(search: Search, path: Path, test: RangeTest | None = None) -> None:
    """Draw what is known of a search.

    Raises:
        FileError: the folder cannot be written.
    """
    from matplotlib.figure import Figure

    panels = 3 if test is not None else 2
    figure = Figure(figsize=(5.2 * panels, 4.4), dpi=110, layout="constrained")
    axes = list(figure.subplots(1, panels))
    if test is not None:
        draw_on(axes.pop(0), test)
    _curves(axes[0], search)
    _losses(axes[1], search)
    for a in axes:
        a.grid(color="#e4e7eb", linewidth=0.6)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    write_atomically(path, out.getvalue())


def _curves(axes: Axes, search: Search) -> None:
    """Validation loss against step, of every rate with the first seed."""
    from matplotlib import colormaps

    first = [r for r in search.runs.values() if r.seed == search.plan.seeds[0] and r.curve]
    first.sort(key=lambda r: r.lr)
    colours = colormaps["viridis"]
    for i, r in enumerate(first):
        colour = colours(0.92 * i / max(len(first) - 1, 1))
        steps, losses = zip(*r.curve, strict=True)
        end = f", given up at {r.steps}" if r.given_up else f", {r.status}" if r.status not in ENDED_WELL else ""
        axes.plot(
            steps,
            losses,
            color=colour,
            linewidth=1.4,
            marker="." if len(steps) < 3 else None,
            label=f"{short(r.lr)}{end}",
        )
        if r.given_up:
            axes.plot(steps[-1], losses[-1], marker="x", color=colour, markersize=8)
    for rung in search.plan.rungs:
        axes.axvline(rung, color=GREY, linewidth=0.8, linestyle=":")
    axes.set(xlabel="step", ylabel="validation loss", title="Coarse grid: × where a rate was given up")
    if first:
        low = min(loss for r in first for _, loss in r.curve)
        high = sorted(r.curve[0][1] for r in first)[len(first) // 2]
        axes.set_ylim(low - 0.05 * (high - low), low + 1.3 * max(high - low, 1e-3))
        axes.legend(frameon=False, fontsize=8, title="lr", title_fontsize=8)


def labelled(rates: Sequence[float], apart: float, first: float | None = None) -> set[float]:
    """Which of the rates get a label: `first` where it is among them, then from the lowest on what has room.

    Args:
        rates: rising. apart: how far two labels have to be from each other, in ln of the rate.
        first: the rate that matters most.

    >>> sorted(labelled([1.0, 2.0, 4.0, 8.0], 1.0, 2.0))
    [2.0, 8.0]
    """
    found: set[float] = set()
    for lr in sorted(rates, key=lambda lr: (lr != first, lr)):
        if all(abs(math.log(lr / other)) >= apart for other in found):
            found.add(lr)
    return found


def _losses(axes: Axes, search: Search) -> None:
    """Best validation loss of full runs against the rate, parabola, interval, recommendation."""
    points = search.full()
    axes.set(xscale="log", xlabel="lr", ylabel="best validation loss", title="Full runs, fit and interval")
    if not points:
        axes.text(0.5, 0.5, "no run at full length has ended well", transform=axes.transAxes, ha="center", color=INK)
        return
    best = min(p.loss for p in points)
    for i, seed in enumerate(sorted({p.seed for p in points})):
        mine = [p for p in points if p.seed == seed]
        axes.plot(
            [p.lr for p in mine], [p.loss for p in mine], "os^Dv"[i % 5], color=BLUE, alpha=0.85, label=f"seed {seed}"
        )
    fit = search.last_fit or search.fit
    lrs = [p.lr for p in points]
    top = max(p.loss for p in points)
    if fit is not None and fit.curvature > 0:
        a, b = math.log(min(fit.used)), math.log(max(fit.used))
        xs = [math.exp(a + (b - a) * i / 100) for i in range(101)]
        axes.plot(xs, [fit.at(x) for x in xs], color=RED, linewidth=1.4, label="parabola in ln(lr)")
    if fit is not None and (fit.bounded or fit.kind == "fitted"):
        said = "" if fit.bounded else ": the searched range"
        axes.axvspan(fit.low, fit.high, color=RED, alpha=0.10, label=f"{100 * fit.confidence:g} % interval{said}")
    if search.recommended is not None:
        sure = {"confirmed": "confirmed", "unconfirmed": "not confirmed"}.get(search.status, "")
        axes.axvline(
            search.recommended, color=GREEN, linewidth=1.4, label=f"{short(rounded(search.recommended))} {sure}".strip()
        )
    axes.set_ylim(best - 0.08 * max(min(top - best, ABOVE), 0.02), best + 1.15 * max(min(top - best, ABOVE), 0.02))
    low, high = min(lrs) / 1.6, max(lrs) * 1.6
    axes.set_xlim(low, high)
    ticks = sorted(set(lrs))
    named = labelled(ticks, APART * math.log(high / low), search.recommended)
    axes.set_xticks(ticks, labels=[short(lr) if lr in named else "" for lr in ticks], fontsize=8)
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes.legend(frameon=False, fontsize=8, loc="best")
