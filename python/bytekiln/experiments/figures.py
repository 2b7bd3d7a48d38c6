"""Pictures of a learning-rate search and of a long run: two by two panels each.

In: what runs wrote into their metrics. Out: panels on a figure, and the figure as a PNG. Called by `lr_search`; imports
no torch, and matplotlib only once something is drawn.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bytekiln.errors import BytekilnError
from bytekiln.metrics import write_atomically
from bytekiln.report.curves import Curve, Floats, averaged, smoothed
from bytekiln.report.rows import Table, read_table
from bytekiln.sweep.axes import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, RED, GREEN, GREY, INK = "#1f5fa8", "#c8502d", "#2f8a57", "#9aa3ad", "#22272e"
POINTS = 400
"""Of a smoothed training curve."""
NO_CURVE = Curve(np.empty(0), np.empty(0))


@dataclass(frozen=True)
class Drawn:
    """What a picture knows of a run."""

    name: str
    """As a legend has it: the exact rate, and the seed or variant where there are several."""
    lr: float
    status: str
    best: float | None
    """Best validation loss, and at which step."""
    best_step: int | None
    last: float | None
    """Validation loss at the end."""
    wins: bool
    table: Table | None
    """Its metrics; None where it has none."""

    def curve(self, column: str) -> Curve:
        """A column by step."""
        return Curve(*self.table.of(column)) if self.table is not None else NO_CURVE

    def training(self) -> Curve:
        """Loss of the training batches, smoothed over a twentieth of the run."""
        means = averaged(*_xy(self.curve("loss")), POINTS) if self.table is not None else NO_CURVE
        return Curve(means.x, smoothed(means.y, len(means) / 20))


def _xy(curve: Curve) -> tuple[Floats, Floats]:
    return curve.x, curve.y


def metrics_of(run: Path) -> Table | None:
    """A run's metrics; None where it has none that can be read."""
    try:
        return read_table(run / "metrics.csv")
    except BytekilnError:
        return None


def new_figure(title: str) -> tuple[Figure, list[Axes]]:
    """An empty figure of two by two panels, without pyplot's global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.4, 8.6), dpi=110, layout="constrained", facecolor="white")
    panels = [axes for row in figure.subplots(2, 2) for axes in row]
    for axes in panels:
        axes.grid(color="#e4e7eb", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title.replace("$", r"\$"), x=0.01, ha="left", fontweight="bold", color=INK)
    return figure, panels


def save(figure: Figure, path: Path) -> None:
    """The figure as a PNG, whole or not at all.

    Raises:
        FileError: the folder cannot be written.
    """
    out = io.BytesIO()
    figure.savefig(out, format="png")
    write_atomically(path, out.getvalue())


# --- a search -----------------------------------------------------------------------------------------------------


def search_figure(runs: Sequence[Drawn], title: str) -> Figure:
    """Validation curves, final loss against rate, training curves, schedules."""
    from matplotlib import colormaps

    figure, (validation, losses, training, schedules) = new_figure(title)
    ordered = sorted(runs, key=lambda r: r.lr)
    rates = sorted({r.lr for r in ordered})
    colours = {lr: colormaps["viridis"](0.92 * i / max(len(rates) - 1, 1)) for i, lr in enumerate(rates)}
    for r in ordered:
        colour, width = colours[r.lr], 2.4 if r.wins else 1.4
        seen = r.curve("val_loss")
        how = "" if r.status == "completed" else f", {r.status.replace('_', ' ')}"
        validation.plot(*_xy(seen), color=colour, linewidth=width, label=f"{r.name}{how}{' (best)' if r.wins else ''}",
                        marker="." if len(seen) < 30 else None)  # fmt: skip
        if r.best is not None and r.best_step is not None:
            validation.plot(r.best_step, r.best, marker="o", color=colour, markersize=6, markeredgecolor="white")
        if r.status == "diverged" and len(seen):
            validation.plot(seen.x[-1], seen.y[-1], marker="x", color=colour, markersize=9)
        training.plot(*_xy(r.training()), color=colour, linewidth=width, label=r.name)
        rate = r.curve("lr")
        moves = rate.y > 0  # the first step of a warm-up does not, and has no place on a logarithmic axis
        schedules.plot(rate.x[moves], rate.y[moves], color=colour, linewidth=width, label=r.name)
    validation.set(xlabel="step", ylabel="validation loss (nats a token)", title="Validation: ● the best of each run")
    training.set(xlabel="step", ylabel="training loss (nats a token)", title="Training, smoothed")
    schedules.set(xlabel="step", ylabel="learning rate", title="Schedules")
    for axes, column in ((validation, "val_loss"), (training, "loss")):
        limits = _limits([r.curve(column) for r in ordered])
        if limits is not None:
            axes.set_ylim(*limits)
    if ordered:
        validation.legend(frameon=False, fontsize=8, title="learning rate", title_fontsize=8)
    if len(rates) > 1 and rates[-1] > 10 * rates[0]:
        schedules.set_yscale("log")
    _losses(losses, ordered)
    return figure


def _losses(axes: Axes, runs: Sequence[Drawn]) -> None:
    """Best and last validation loss against the rate; what cannot win is marked."""
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation loss (nats a token)",
             title="Loss against rate: the best decides, not the last")  # fmt: skip
    if runs:  # first: of runs without a loss there is nothing by which the axis could find its ends
        axes.set_xlim(min(r.lr for r in runs) / 1.5, max(r.lr for r in runs) * 1.5)
    ranked = [r for r in runs if r.status in ("completed", "early_stopped")]
    best = [(r.lr, r.best) for r in ranked if r.best is not None]
    last = [(r.lr, r.last) for r in ranked if r.last is not None]
    if best:
        axes.plot(*zip(*best, strict=True), "-o", color=BLUE, linewidth=1.2, label="best")
    if last:
        axes.plot(*zip(*last, strict=True), "o", color=RED, fillstyle="none", markersize=9, label="last")
    for r in ranked:
        if r.wins and r.best is not None:
            axes.plot([r.lr], [r.best], marker="*", color=GREEN, markersize=14, zorder=3, linestyle="none",
                      label=f"{r.name}: {r.best:.4f}")  # fmt: skip
    for status, mark in (("diverged", "x"), ("failed", "s"), ("interrupted", "|")):
        those = [r.lr for r in runs if r.status == status]
        if those:
            axes.plot(those, [0.96] * len(those), mark, color=INK, markersize=9, label=status, clip_on=False,
                      transform=axes.get_xaxis_transform())  # fmt: skip
    if runs:
        ticks = sorted({r.lr: r.name for r in runs})
        axes.set_xticks(ticks, labels=[short(lr) for lr in ticks], fontsize=8)
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    else:
        axes.text(0.5, 0.5, "no run has begun", transform=axes.transAxes, ha="center", color=INK)


def _limits(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """From below the lowest value to above what the runs begin with: a diverged end does not flatten the rest."""
    found = [c.y for c in curves if len(c)]
    if not found:
        return None
    low = min(float(y.min()) for y in found)
    high = min(max(float(y.max()) for y in found), max(float(y[0]) for y in found) * 1.05)
    span = high - low or 1.0
    return low - 0.04 * span, high + 0.04 * span


# --- a long run ---------------------------------------------------------------------------------------------------


def long_figure(run: Drawn, title: str) -> Figure:
    """Losses, validation accuracy, perplexity and learning rate of one run, by step."""
    figure, (losses, accuracy, perplexity, rate) = new_figure(title)
    raw, val = run.curve("loss"), run.curve("val_loss")
    losses.plot(*_xy(raw), color=BLUE, linewidth=0.7, alpha=0.25)
    losses.plot(*_xy(run.training()), color=BLUE, linewidth=1.5, label="training, smoothed")
    losses.plot(*_xy(run.curve("train_eval_loss")), color=GREEN, linewidth=1.3, linestyle="--",
                label="training data, evaluated")  # fmt: skip
    losses.plot(*_xy(val), color=RED, linewidth=1.8, label="validation")
    if run.best is not None and run.best_step is not None:
        losses.plot(run.best_step, run.best, "o", color=RED, markersize=7, markeredgecolor="white",
                    label=f"best: {run.best:.4f} at step {run.best_step:,}")  # fmt: skip
    limits = _limits([raw, val])
    if limits is not None:
        losses.set_ylim(*limits)
    losses.set(xlabel="step", ylabel="loss (nats a token)", title="Loss")
    losses.legend(frameon=False, fontsize=8)
    right = run.curve("val_accuracy")
    accuracy.plot(right.x, 100 * right.y, color=RED, linewidth=1.8)
    accuracy.set(xlabel="step", ylabel="% of next tokens", title="Validation accuracy")
    finite = val.y < math.log(1e300)
    perplexity.plot(val.x[finite], np.exp(val.y[finite]), color=RED, linewidth=1.8)
    perplexity.set(xlabel="step", ylabel="e to the loss", title="Validation perplexity", yscale="log")
    rate.plot(*_xy(run.curve("lr")), color=INK, linewidth=1.5)
    rate.set(xlabel="step", ylabel="learning rate", title=f"Learning rate, peak {run.name}")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    return figure
