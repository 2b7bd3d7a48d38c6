"""Pictures of runs, drawn from their files alone. In: run folders. Out: a PNG. Imports no torch.

Called by `cli_lm`. matplotlib is used without a display and without its global state.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bytekiln.config import UNLIMITED_STEPS, RunConfig, load_config
from bytekiln.errors import ConfigError, FileError, FormatError, OutputExistsError
from bytekiln.metrics import Row, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#1f5fa8", "#c8502d", "#2f8a57", "#7d4fa3", "#b58a17", "#2b9aa8", "#a33b6c", "#5b6770")
"""Told apart by eyes that confuse red and green, and in print."""
INK, FAINT = "#22272e", "#d9dde2"


@dataclass(frozen=True)
class Run:
    """What a run folder tells."""

    folder: Path
    name: str
    rows: list[Row]
    config: RunConfig
    result: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read a run folder, finished or not.

        Raises:
            FileError: it is no run folder.
            FormatError: a file in it is malformed, or there is no row yet.
        """
        if not (folder / "config.toml").is_file():
            raise FileError(f"{folder}: found no config.toml; expected a run folder")
        config = load_config(folder / "config.toml")
        metrics = Path(config.output.metrics_path) if config.output.metrics_path else folder / "metrics.csv"
        rows = read_metrics(metrics)
        if not any(r.step for r in rows):
            raise FormatError(f"{metrics}: found no step; expected at least one")
        try:
            result = json.loads((folder / "result.json").read_text("utf-8"))
        except FileNotFoundError:
            result = {}
        except (OSError, ValueError):
            raise FormatError(f"{folder / 'result.json'}: found no JSON; expected the result of a run") from None
        numbers = ("parameters", "final_bits_per_byte", "tokens_per_s")
        if not isinstance(result, dict) or not all(isinstance(result.get(k), int | float | None) for k in numbers):
            raise FormatError(f"{folder / 'result.json'}: found other JSON; expected the result of a run")
        return cls(folder, folder.resolve().name, rows, config, result)

    @property
    def steps(self) -> int:
        """Steps done, whatever came out of them."""
        return self.rows[-1].step

    @property
    def evaluations(self) -> list[tuple[int, float]]:
        """Steps, and validation losses behind them."""
        return [(r.step, r.val_loss) for r in self.rows if r.val_loss is not None]

    @property
    def label(self) -> str:
        """The name for matplotlib, which takes dollar signs for formulas."""
        return self.name.replace("$", r"\$")


def draw(runs: Sequence[Run], out: Path, *, overwrite: bool = False) -> None:
    """Draw the loss curves of one run, or of several against each other, above their learning rates.

    Args:
        runs: at least one.
        out: the PNG; written whole or not at all.
        overwrite: replace it if it exists.

    Raises:
        OutputExistsError: it exists.
        FileError: it cannot be written.
    """
    if out.exists() and not overwrite:
        raise OutputExistsError(
            f"{out}: exists; expected a free name: --overwrite replaces it, --out takes another name"
        )
    if out.suffix.lower() != ".png":
        raise ConfigError(f"{out}: found suffix {out.suffix or 'none'}; expected .png")
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(
        {
            "font.size": 10.5,
            "axes.edgecolor": "#8a929c",
            "text.color": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
        }
    ):
        figure = Figure(figsize=(9.6, 6.6), dpi=150, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, 1))
        for i, run in enumerate(runs):
            colour = COLOURS[i % len(COLOURS)]
            _draw_losses(losses, run, colour, alone=len(runs) == 1)
            steps = [r for r in run.rows if r.lr is not None]
            rates.plot([r.step for r in steps], [r.lr for r in steps], color=colour, linewidth=1.4)
        _frame(losses, "loss (nats a token)")
        _frame(rates, "learning rate")
        rates.set_xlabel("step")
        rates.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        rates.set_ylim(bottom=0)
        losses.set_xlim(0, max(r.steps for r in runs) * 1.01)
        losses.set_ylim(*_limits(runs))
        vocabularies = {r.config.model.vocab_size for r in runs}
        uniform = math.log(max(vocabularies))
        if len(vocabularies) == 1 and uniform <= losses.get_ylim()[1]:
            losses.axhline(
                uniform,
                color="#8a929c",
                linewidth=1,
                linestyle=(0, (4, 3)),
                label=f"uniform guess, ln {vocabularies.pop():,}",
            )
        losses.legend(loc="upper right", facecolor="white", edgecolor="none", framealpha=1, labelcolor=INK)
        losses.set_title(_title(runs), loc="left", fontsize=12.5, fontweight="bold")
        if len(runs) == 1:
            losses.annotate(
                _subtitle(runs[0]),
                (0, 1),
                (0, 2),
                "axes fraction",
                "offset points",
                fontsize=9,
                color="#5b6770",
                va="bottom",
            )
            losses.set_title(_title(runs), loc="left", fontsize=12.5, fontweight="bold", pad=18)
        temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
        try:
            figure.savefig(temporary, format="png")
            temporary.replace(out)
        except OSError as exc:
            temporary.unlink(missing_ok=True)
            raise FileError(
                f"{out}: cannot be written: {(exc.strerror or str(exc)).lower()}; expected a writable folder"
            ) from None


def smoothed(values: Sequence[float], span: int) -> list[float]:
    """Exponential moving average over about `span` values, without the pull towards its start (as in Adam).

    >>> smoothed([2.0, 2.0, 2.0], 10)
    [2.0, 2.0, 2.0]
    """
    keep, total, weight, out = 1 - 2 / (span + 1), 0.0, 0.0, []
    for v in values:
        total, weight = keep * total + v, keep * weight + 1
        out.append(total / weight)
    return out


def _draw_losses(axes: Axes, run: Run, colour: str, *, alone: bool) -> None:
    points = [(r.step, r.loss) for r in run.rows if r.loss is not None]
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    label = "" if alone else f"{run.label}, "
    if alone:
        axes.plot(steps, losses, color=colour, linewidth=0.7, alpha=0.22, label="training, every step")
    smooth = smoothed(losses, max(1, len(losses) // 50))
    fallback = f"{label}training, smoothed" if alone or not run.evaluations else None
    axes.plot(steps, smooth, color=colour, linewidth=1.6 if alone else 0.9, alpha=1 if alone else 0.5, label=fallback)
    if run.evaluations:
        axes.plot(
            [step for step, _ in run.evaluations],
            [loss for _, loss in run.evaluations],
            color=COLOURS[1] if alone else colour,
            linewidth=1.8,
            marker="o",
            markersize=4,
            label=f"{label}validation, best {_best(run)[1]:.3f}",
        )


def _best(run: Run) -> tuple[int, float]:
    """Step and loss of the best evaluation; of equal ones the first, as `checkpoint_best`."""
    return min(run.evaluations, key=lambda e: e[1])


def _limits(runs: Sequence[Run]) -> tuple[float, float]:
    """From below the lowest loss to above the highest at the start: a diverged end does not flatten the rest."""
    found = [[x for r in run.rows for x in (r.loss, r.val_loss) if x is not None] for run in runs]
    every = [x for losses in found for x in losses]
    if not every:
        return 0.0, 1.0
    first = max(x for losses in found for x in losses[:2])
    low, high = min(every), min(max(every), first * 1.5)
    span = high - low or 1.0
    return low - 0.05 * span, high + 0.06 * span


def _frame(axes: Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.grid(visible=True, color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _title(runs: Sequence[Run]) -> str:
    return runs[0].label if len(runs) == 1 else f"{len(runs)} runs compared"


def _subtitle(run: Run) -> str:
    m, result = run.config.model, run.result
    parts = [
        f"{m.num_layers} layers × {m.d_model}, {m.num_heads} heads, context {m.context_length}, "
        f"vocabulary {m.vocab_size:,}"
    ]
    if result.get("parameters"):
        parts.append(f"{result['parameters'] / 1e6:.2f} M parameters")
    if result.get("final_bits_per_byte"):
        parts.append(f"{result['final_bits_per_byte']:.3f} bits a byte")
    if result.get("tokens_per_s"):
        parts.append(f"{result['tokens_per_s']:,.0f} tokens a second")
    if result and result.get("status") != "completed":
        parts.append(str(result.get("status")))
    return " · ".join(parts)


def summary(run: Run) -> list[tuple[str, str]]:
    """The run in a few lines: (what, value)."""
    limit = run.config.training.max_steps
    last = next((r for r in reversed(run.rows) if r.loss is not None), None)
    of_step = f" at step {last.step:,}: later ones are not finite" if last and last.step < run.steps else ""
    rows = [
        ("run", str(run.folder)),
        ("status", str(run.result.get("status", "no result yet"))),
        ("step", f"{run.steps:,}" + (f" of {limit:,}" if limit < UNLIMITED_STEPS else "")),
        ("training loss", f"{last.loss:.4f}{of_step}" if last else "none that is finite"),
    ]
    if run.evaluations:
        step, loss = _best(run)
        rows += [("validation loss", f"{run.evaluations[-1][1]:.4f}"), ("best", f"{loss:.4f} at step {step:,}")]
        bits = next(r.bits_per_byte for r in reversed(run.rows) if r.val_loss is not None)
        if bits is not None:
            rows.append(("bits a byte", f"{bits:.4f}"))
    return rows
