"""The report's charts as PNG files, with matplotlib. In: a `Report`. Out: pictures. Called by `report`; no torch.

matplotlib is used without a display and without its global state, and imported when something is drawn.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bytekiln.atomic import write_file
from bytekiln.errors import ConfigError
from bytekiln.report.data import LIGHT, colours
from bytekiln.report.groups import Group
from bytekiln.report.model import Report
from bytekiln.report.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, GRID = "#22272e", "#5b6770", "#d9dde2"
LEGEND_ROWS, LAYER_PICTURES = 14, 6
"""Names in a legend; runs whose layers are drawn side by side."""
CURVES = {
    "overfitting": ("gap", "validation minus training loss (nats a token)", False),
    "schedule": ("lr", "learning rate", False),
    "gradient_norm": ("grad_norm", "gradient norm before clipping", True),
    "throughput": ("tokens_per_s", "tokens a second", False),
    "validation_accuracy": ("val_accuracy", "share of validation tokens that were the most likely one", False),
    "expert_load": ("expert_load", "load of the busiest expert over the mean", False),
}
"""Pictures of one curve a run: its column, the axis's name, whether the axis is logarithmic."""
Drawn = Callable[["Figure"], None]


def pictures(report: Report) -> dict[str, Drawn]:
    """Every picture that there is something to draw in, by the name of its file without `.png`."""
    has = {n for r in report.runs for n in r.curves}
    out: dict[str, Drawn] = {}
    if {"loss", "val_loss"} & has:
        out["loss"] = lambda f: draw_losses(f, report)
    for i, series in enumerate(report.rates):
        if series.points:
            name = "loss_against_lr" + (f"_{i + 1}" if len(report.rates) > 1 else "")
            out[name] = lambda f, i=i: _rates(f, report, i)  # type: ignore[misc]
    if any(c.difference for c in report.comparisons):
        out["differences"] = lambda f: _differences(f, report)
    for name, (column, label, log) in CURVES.items():
        if column in has:
            out[name] = lambda f, c=column, w=label, g=log: _curves(f, report, c, w, log=g)  # type: ignore[misc]
    if any(r.layers for r in report.runs):
        out["layers"] = lambda f: _layers(f, report)
    if any(r.layers and r.layers.counts for r in report.runs):
        out["gradient_sizes"] = lambda f: _gradient_sizes(f, report)
    return out


def write_picture(draw: Drawn, out: Path, *, overwrite: bool) -> None:
    """Draw one picture; the file is written whole or not at all.

    Raises:
        ConfigError: its name does not end in .png.
        OutputExistsError: it exists.
        FileError: it cannot be written.
    """
    if out.suffix.lower() != ".png":
        raise ConfigError(f"{out}: found suffix {out.suffix or 'none'}; expected .png")
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = {
        "font.size": 10.5,
        "axes.edgecolor": "#8a929c",
        "text.color": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with rc_context(style):  # type: ignore[arg-type]
        figure = Figure(figsize=(9.6, 6.0), dpi=150, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        draw(figure)
        data = io.BytesIO()
        with warnings.catch_warnings():  # a name in a script that matplotlib's font lacks is drawn as boxes
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            figure.savefig(data, format="png")
    write_file(out, data.getvalue(), overwrite=overwrite)


def _plain(text: str, most: int = 60) -> str:
    """A text for matplotlib, which takes dollar signs for formulas."""
    return (text if len(text) <= most else f"{text[: most - 1]}…").replace("$", r"\$")


def _frame(axes: Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.grid(visible=True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _palette(report: Report) -> list[str]:
    return [light for light, _ in colours(len(report.groups))]


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > LEGEND_ROWS:
        handles, labels = (
            handles[:LEGEND_ROWS],
            [*labels[: LEGEND_ROWS - 1], f"and {len(labels) - LEGEND_ROWS + 1} more"],
        )
    if handles:
        axes.legend(
            handles, labels, loc="upper right", facecolor="white", edgecolor="none", framealpha=0.85, labelcolor=INK
        )


def draw_losses(figure: Figure, report: Report) -> None:
    """Loss curves of one run, or of several against each other, above their learning rates."""
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, 1))
    runs, alone = report.runs, len(report.runs) == 1
    for group, colour in zip(report.groups, _palette(report), strict=True):
        for k, run in enumerate(group.runs):
            _draw_losses(losses, run, colour, alone=alone, label=_label(group) if k == 0 else "")
            if (lr := run.curves.get("lr")) is not None:
                rates.plot(lr.x, lr.y, color=colour, linewidth=1.4)
    _frame(losses, "loss (nats a token)")
    _frame(rates, "learning rate")
    rates.set_xlabel("step")
    tops = [float(r.curves["lr"].y.max()) for r in runs if "lr" in r.curves]
    if tops and max(tops) > 30 * max(min(tops), 1e-30):
        rates.set_yscale("log")
    else:
        rates.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        rates.set_ylim(bottom=0)
    losses.set_xlim(0, max(max(r.steps for r in runs), 1) * 1.01)
    losses.set_ylim(*_limits(runs))
    vocabularies = {v for r in runs if isinstance(v := r.config.get("vocab_size"), int) and v > 1}
    if len(vocabularies) == 1 and (uniform := math.log(max(vocabularies))) <= losses.get_ylim()[1]:
        name = f"uniform guess, ln {vocabularies.pop():,}"
        losses.axhline(uniform, color="#8a929c", linewidth=1, linestyle=(0, (4, 3)), label=name)
    _legend(losses)
    title = _plain(runs[0].name) if alone else _plain(report.title)
    losses.set_title(title, loc="left", fontsize=12.5, fontweight="bold", pad=18 if alone else 6)
    if alone:
        losses.annotate(_plain(_subtitle(runs[0]), 130), (0, 1), (0, 2), "axes fraction", "offset points",
                        fontsize=9, color=FAINT, va="bottom")  # fmt: skip


def _label(group: Group) -> str:
    if group.mean is None:
        return _plain(group.name)
    return f"{_plain(group.name)}, best validation {group.mean:.3f}{' in the mean' if len(group.losses) > 1 else ''}"


def _draw_losses(axes: Axes, run: Run, colour: str, *, alone: bool, label: str = "") -> None:
    validation = run.curves.get("val_loss")
    if (loss := run.curves.get("loss")) is not None:
        smooth = run.curves["loss_smooth"]
        if alone:
            axes.plot(loss.x, loss.y, color=colour, linewidth=0.7, alpha=0.22, label="training, every step")
        name = "training, smoothed" if alone else label if validation is None else ""
        width, alpha = (1.6, 1.0) if alone or validation is None else (0.9, 0.5)
        axes.plot(smooth.x, smooth.y, color=colour, linewidth=width, alpha=alpha, label=name or None)
    if validation is not None:
        name = f"validation, best {float(validation.y.min()):.3f}" if alone else label
        axes.plot(validation.x, validation.y, color=LIGHT[1] if alone else colour, linewidth=1.8,
                  marker="o" if len(validation) <= 40 else "", markersize=4, label=name or None)  # fmt: skip


def _limits(runs: Sequence[Run]) -> tuple[float, float]:
    """From below the lowest loss to above the highest at the start: a diverged end does not flatten the rest."""
    found = [c.y for r in runs for n in ("loss", "val_loss") if (c := r.curves.get(n)) is not None and len(c)]
    if not found:
        return 0.0, 1.0
    first = max(float(y[:2].max()) for y in found)
    low, high = min(float(y.min()) for y in found), max(float(y.max()) for y in found)
    high = min(high, first * 1.1)
    span = high - low or 1.0
    return low - 0.05 * span, high + 0.06 * span


def _subtitle(run: Run) -> str:
    c = run.config
    parts = []
    if {"num_layers", "d_model", "num_heads", "context_length"} <= set(c):
        parts.append(
            f"{c['num_layers']} layers × {c['d_model']}, {c['num_heads']} heads, context {c['context_length']}"
        )
    for name, words, scale in (("parameters", "M parameters", 1e-6), ("tokens_per_s", "tokens a second", 1.0)):
        if (value := run.number(name)) is not None:
            parts.append(f"{value * scale:,.2f} {words}" if scale < 1 else f"{value:,.0f} {words}")
    if (bits := run.number("final_bits_per_byte")) is not None:
        parts.insert(2, f"{bits:.3f} bits a byte")
    return " · ".join([*parts, *([run.status] if run.status != "completed" else [])])


def _curves(figure: Figure, report: Report, column: str, label: str, *, log: bool) -> None:
    axes = figure.subplots()
    tops = []
    for group, colour in zip(report.groups, _palette(report), strict=True):
        named = False
        for run in group.runs:
            if (c := run.curves.get(column)) is not None and len(c):
                axes.plot(c.x, c.y, color=colour, linewidth=1.3, alpha=0.9, label=None if named else _plain(group.name))
                named = True
                tops.append(float(c.y.max()))
    _frame(axes, label)
    axes.set_xlabel("step")
    if log or (column == "lr" and min(tops) > 0 and max(tops) > 30 * min(tops)):
        axes.set_yscale("log")
    if column == "gap":
        axes.axhline(0, color="#8a929c", linewidth=1)
    if column == "tokens_per_s":
        axes.set_ylim(bottom=0)
    if len(report.groups) > 1:  # the title names a single one, and the curve may end where a legend would stand
        _legend(axes)
    axes.set_title(_plain(report.title), loc="left", fontsize=12.5, fontweight="bold")


def _rates(figure: Figure, report: Report, number: int) -> None:
    axes, series, palette = figure.subplots(), report.rates[number], _palette(report)
    for lr, loss, group in series.points:
        axes.plot([lr], [loss], "o", color=palette[group], markersize=6, markeredgecolor="white")
    axes.plot(*zip(*series.means, strict=True), color=FAINT, linewidth=1, linestyle=":", label="mean over seeds")
    if series.curve:
        axes.plot(*zip(*series.curve, strict=True), color=LIGHT[0], linewidth=2, label="parabola in ln(learning rate)")
    f = series.fit
    if f is not None and f.kind == "fitted":
        axes.axvline(f.lr, color=LIGHT[0], linestyle="--", linewidth=1.2, label=f"minimum, {f.lr:.3g}")
        if f.bounded:
            name = f"{100 * f.confidence:.0f} % interval"
            axes.axvspan(f.low, f.high, color=LIGHT[0], alpha=0.12, linewidth=0, label=name)
    for k, lr in enumerate(series.lost):
        axes.plot([lr], [0.04], "x", color=LIGHT[1], markersize=8, transform=axes.get_xaxis_transform(),
                  label="diverged" if k == 0 else None)  # fmt: skip
    axes.set_xscale("log")
    _frame(axes, "lowest validation loss (nats a token)")
    axes.set_xlabel("learning rate")
    _legend(axes)
    axes.set_title(_plain(series.name or report.title), loc="left", fontsize=12.5, fontweight="bold")


def _differences(figure: Figure, report: Report) -> None:
    axes, palette = figure.subplots(), _palette(report)
    shown = [c for c in report.comparisons if c.difference][:40]
    number = {id(g): i for i, g in enumerate(report.groups)}
    for k, c in enumerate(shown):
        d, colour = c.difference, palette[number[id(c.group)]]
        if d is None:
            continue
        if d.low is not None and d.high is not None:
            axes.plot([d.low, d.high], [k, k], color=colour, linewidth=2.2)
        axes.plot([d.mean], [k], "o", color=colour, markersize=7)
    reach = 4 * max(abs(c.difference.mean) for c in shown if c.difference)
    low, high = axes.get_xlim()
    if reach:
        axes.set_xlim(max(low, -reach), min(high, reach))
    axes.axvline(0, color="#8a929c", linewidth=1)
    axes.set_yticks(range(len(shown)), [f"{_plain(c.group.name, 36)}\n{c.verdict}" for c in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    _frame(axes, "")
    axes.set_xlabel(
        f"validation loss minus that of {_plain(report.baseline.name if report.baseline else '')}; bars: 95 % interval"
    )
    axes.set_title(_plain(report.title), loc="left", fontsize=12.5, fontweight="bold")


def _layers(figure: Figure, report: Report) -> None:
    from matplotlib.colors import LogNorm

    firsts = [next((r for r in g.runs if r.layers and "gradient" in r.layers.norms), None) for g in report.groups]
    runs = [r for r in firsts if r is not None and r.layers is not None][:LAYER_PICTURES]
    figure.set_size_inches(max(6.4, 3.6 * len(runs)), 5.2)
    every = [np.array([[np.nan if v is None else v for v in row] for row in r.layers.norms["gradient"].values()])
             for r in runs if r.layers]  # fmt: skip
    positive = [float(v) for m in every for v in m.ravel() if v > 0]
    norm = LogNorm(min(positive, default=1e-3), max(max(positive, default=1.0), 1.001 * min(positive, default=1e-3)))
    panes = np.atleast_1d(np.asarray(figure.subplots(1, max(len(runs), 1), squeeze=False)).ravel())
    image = None
    for k, (run, values, axes) in enumerate(zip(runs, every, panes, strict=False)):
        if run.layers is None:
            continue
        steps = run.layers.steps
        image = axes.imshow(values, aspect="auto", norm=norm, cmap="viridis", interpolation="nearest")
        names = list(run.layers.norms["gradient"])
        axes.set_yticks(
            range(len(names)),
            names
            if k == 0 or names != list(runs[0].layers.norms["gradient"] if runs[0].layers else [])
            else [""] * len(names),
        )
        some = sorted({0, len(steps) // 2, len(steps) - 1})
        axes.set_xticks(some, [f"{steps[i]:,}" for i in some])
        axes.set_xlabel("step")
        axes.set_title(_plain(run.name, 34), loc="left", fontsize=11)
    if image is not None:
        figure.colorbar(image, ax=panes.tolist(), label="gradient norm", shrink=0.8)


def _gradient_sizes(figure: Figure, report: Report) -> None:
    """Share of a layer's gradients in each power of 4 at the last record, the first run of each group."""
    firsts = [next((r for r in g.runs if r.layers and r.layers.counts), None) for g in report.groups]
    runs = [(r, r.layers.counts) for r in firsts if r is not None and r.layers is not None][:LAYER_PICTURES]
    figure.set_size_inches(max(6.4, 3.6 * len(runs)), 5.2)
    panes = np.atleast_1d(np.asarray(figure.subplots(1, len(runs), squeeze=False)).ravel())
    image = None
    for k, ((run, counts), axes) in enumerate(zip(runs, panes, strict=True)):
        shares = np.array([np.array(c) / max(sum(c), 1) for c in counts.values()])
        image = axes.imshow(shares, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0.0)
        axes.set_yticks(range(len(counts)), [*counts] if k == 0 else [""] * len(counts))
        some = [*range(0, shares.shape[1], 8)]
        axes.set_xticks(some, [_power(i) for i in some])
        axes.set_xlabel("size of a gradient")
        axes.set_title(_plain(run.name, 34), loc="left", fontsize=11)
    if image is not None:
        figure.colorbar(image, ax=panes.tolist(), label="share of a layer's gradients", shrink=0.8)


def _power(bin_: int) -> str:
    """The lower end of a bin of the histogram (docs/formats.md, `layers.csv`).

    >>> [_power(i) for i in (0, 1, 25)]
    ['≈0', '6e-11', 'huge']
    """
    return (
        "≈0"
        if bin_ == 0
        else "huge"
        if bin_ == 25
        else f"{4.0 ** (bin_ - 18):.0e}".replace("e+0", "e").replace("e-0", "e-")
    )
