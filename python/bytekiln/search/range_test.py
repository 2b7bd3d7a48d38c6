"""The learning-rate range test (Smith 2017): one short run whose rate rises from far too low to far too high.

In: a run's config. Out: `RangeTest`: the losses, where the loss fell fastest, where it ran away, and a suggestion; as
`range_test.csv`, JSON and a picture. Called by `search.runs`; torch is loaded only by `measure`.

Two rates are read off. Where the loss falls fastest per decade, the model surely learns, but a run needs more: one
step at each rate rewards any movement (the first thing learnt, how frequent tokens are, comes at almost any rate). A
tenth of the rate at which the loss runs away is the other usual advice, and mostly too much for the whole of a run. The
best rate lies between the two, and the suggestion is their geometric mean: the middle of a grid, not a result.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bytekiln.errors import ConfigError, FileError, FormatError
from bytekiln.metrics import write_atomically
from bytekiln.search.plan import FEWEST_STEPS
from bytekiln.sweep.axes import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from bytekiln.config import RunConfig

SMOOTHING = 0.8
"""Decay of the exponential mean of the losses, its beginning corrected."""
TOO_HIGH = 1.5
"""The loss has run away once its mean is above this multiple of the least mean so far."""
HALF = 2
"""Steps on either side of one that its mean is taken over."""
WINDOW_DECADES = 1.0
"""The slope is that of a line through the losses of so much of the range."""
COLUMNS = ("step", "lr", "loss", "smoothed")


@dataclass(frozen=True)
class RangeRow:
    """A step of the test; a loss that is not finite is none."""

    step: int
    lr: float
    loss: float | None
    """Of the batch, before the step."""
    smoothed: float | None


@dataclass(frozen=True)
class RangeTest:
    """What a range test found."""

    rows: tuple[RangeRow, ...]
    suggestion: float
    steepest: float
    """Rate at which the loss fell fastest per decade."""
    diverged_at: float | None
    """Rate at which the loss ran away; None: it never did."""
    why: str
    """The rule and its numbers, in a sentence."""

    @property
    def summary(self) -> dict[str, Any]:
        """What `search.json` holds of it."""
        told = {k: v for k, v in asdict(self).items() if k != "rows"}
        lrs = [r.lr for r in self.rows]
        return {**told, "steps": len(self.rows), "low": lrs[0], "high": lrs[-1]}


def rates(low: float, high: float, steps: int) -> list[float]:
    """The rate of each step, rising exponentially, both ends included.

    >>> [f"{r:.0e}" for r in rates(1e-9, 1.0, 10)][:3]
    ['1e-09', '1e-08', '1e-07']

    Raises:
        ConfigError: the ends do not rise above 0, or there are too few steps to see a slope.
    """
    if not 0 < low < high:
        raise ConfigError(f"range: found {low:g} to {high:g}; expected two rising rates above 0")
    if steps < FEWEST_STEPS:
        raise ConfigError(f"range_steps: found {steps}; expected at least {FEWEST_STEPS}")
    return [low * (high / low) ** (i / (steps - 1)) for i in range(steps)]


def run_range_test(losses: Callable[[float], float], schedule: Sequence[float]) -> list[RangeRow]:
    """Take a step at each rate until the loss runs away.

    Args:
        losses: takes a step at a rate and gives the loss before it.
        schedule: of `rates`.

    Returns:
        A row a step; the last one is that at which the loss ran away, where it did.
    """
    rows: list[RangeRow] = []
    mean, least = 0.0, math.inf
    for i, lr in enumerate(schedule):
        loss = losses(lr)
        if not math.isfinite(loss):
            rows.append(RangeRow(i + 1, lr, None, None))
            break
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        smoothed = mean / (1 - SMOOTHING ** (i + 1))
        rows.append(RangeRow(i + 1, lr, loss, smoothed))
        least = min(least, smoothed)
        if smoothed > TOO_HIGH * least:
            break
    return rows


def judge(rows: Sequence[RangeRow]) -> RangeTest:
    """Read the two rates off, and suggest one.

    Raises:
        ConfigError: the loss ran away before anything could be seen.
    """
    seen = [(math.log10(r.lr), r.loss) for r in rows if r.loss is not None]
    last = rows[-1] if rows else None
    smoothed = [r.smoothed for r in rows if r.smoothed is not None]
    ran_away = last is not None and (last.smoothed is None or last.smoothed > TOO_HIGH * min(smoothed))
    diverged_at = last.lr if last is not None and ran_away else None
    least = smoothed.index(min(smoothed)) + 1 if smoothed else 0
    falling = seen[:least]
    if len(falling) < FEWEST_STEPS // 2:
        where = f"at {short(float(f'{diverged_at:.3g}'))}" if diverged_at else "from its start on"
        raise ConfigError(
            f"range test: the loss ran away {where}, after {len(rows)} steps; expected a lower range (--range LOW HIGH)"
        )
    steepest = 10 ** _steepest(falling)
    high = diverged_at / 10 if diverged_at else rows[-1].lr / 10
    suggestion = math.sqrt(steepest * max(high, steepest))
    two = [float(f"{x:.2g}") for x in (suggestion, steepest, high)]
    end = f"it runs away at {diverged_at:.2g}" if diverged_at else f"it never runs away up to {rows[-1].lr:.2g}"
    why = (
        f"{short(two[0])} is the geometric mean of {short(two[1])}, where the loss falls fastest, and of "
        f"{short(two[2])}, a tenth of the end: {end}"
    )
    return RangeTest(tuple(rows), suggestion, steepest, diverged_at, why)


def _steepest(points: Sequence[tuple[float, float]]) -> float:
    """The log10 of the rate round which a line through the losses falls fastest.

    Of the lowest centred mean so far: a bump and the way back from it are no fall, and nothing lags behind.
    """
    means = []
    for i in range(len(points)):
        near = [y for _, y in points[max(i - HALF, 0) : i + HALF + 1]]
        means.append(sum(near) / len(near))
    lowest = list(itertools.accumulate(means, min))
    best, where = math.inf, points[-1][0]
    for middle, _ in points:
        window = [(x, y) for (x, _), y in zip(points, lowest, strict=True) if abs(x - middle) <= WINDOW_DECADES / 2]
        if len(window) < 3:
            continue
        x0 = sum(x for x, _ in window) / len(window)
        slope = sum((x - x0) * y for x, y in window) / sum((x - x0) ** 2 for x, _ in window)
        if slope < best:
            best, where = slope, x0
    return where


def measure(
    config: RunConfig, *, low: float, high: float, steps: int, each: Callable[[int], object] = lambda _: None
) -> RangeTest:
    """The test on the run's own model, data, optimizer and seed; the run's schedule and averaging are left out.

    Args:
        config: the run. low, high, steps: as `rates`.
        each: told the number of steps done.

    Raises:
        BytekilnError: the run cannot be built.
    """
    from bytekiln.search.bare_run import BareRun

    schedule = rates(low, high, steps)
    with BareRun(config.with_(averaging="none")) as run:

        def step(lr: float) -> float:
            loss = run.take_step(lr)
            each(run.step)
            return loss

        return judge(run_range_test(step, schedule))


# --- files ----------------------------------------------------------------------------------------------------


def write_range_test(test: RangeTest, folder: Path) -> None:
    """`range_test.csv`, `range_test.png` and, last, `range_test.json`: with it the stage is done.

    Raises:
        FileError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise FileError(f"{folder}: {(exc.strerror or str(exc)).lower()}; expected a writable folder") from None
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(["" if v is None else v for v in (r.step, r.lr, r.loss, r.smoothed)] for r in test.rows)
    write_atomically(folder / "range_test.csv", out.getvalue().encode())
    draw_range_test(test, folder / "range_test.png")
    about = {"format": "bytekiln-range-test", "version": 1, **test.summary}
    write_atomically(folder / "range_test.json", json.dumps(about, indent=1, allow_nan=False).encode() + b"\n")


def read_range_test(folder: Path) -> RangeTest | None:
    """A range test that is done; None: there is none.

    Raises:
        FormatError: its files are not what `write_range_test` writes.
    """
    if not (folder / "range_test.json").exists():
        return None
    path = folder / "range_test.csv"
    try:
        lines = list(csv.reader(path.read_text("utf-8").splitlines()))
        if tuple(lines[0]) != COLUMNS:
            raise ValueError(f"columns {','.join(lines[0])}")
        return judge([RangeRow(int(s), float(lr), *_numbers(rest)) for s, lr, *rest in lines[1:]])
    except (OSError, ValueError, IndexError, TypeError) as exc:
        raise FormatError(f"{path}: {exc}; expected the rows of a range test: {','.join(COLUMNS)}") from None


def _numbers(cells: Iterable[str]) -> Iterator[Any]:
    return (float(c) if c else None for c in cells)


def draw_range_test(test: RangeTest, path: Path) -> None:
    """The losses against the rate, with what was read off, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    draw_on(figure.add_subplot(), test)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    write_atomically(path, out.getvalue())


def draw_on(axes: Axes, test: RangeTest) -> None:
    """The same on axes of a larger picture."""
    points = [(r.lr, r.loss) for r in test.rows if r.loss is not None]
    means = [(r.lr, r.smoothed) for r in test.rows if r.smoothed is not None]
    axes.plot(*zip(*points, strict=True), ".", color="#9aa3ad", markersize=4, label="loss of each step")
    axes.plot(*zip(*means, strict=True), color="#1f5fa8", label="smoothed")
    marks = [
        (test.steepest, "falls fastest", ":"),
        (test.suggestion, f"suggestion {short(float(f'{test.suggestion:.2g}'))}", "-"),
    ]
    if test.diverged_at:
        marks.append((test.diverged_at, "runs away", "--"))
    for lr, label, style in marks:
        axes.axvline(lr, color="#c8502d", linestyle=style, linewidth=1.2, label=label)
    low, high = min(v for _, v in means), max(v for _, v in means[:3])
    room = 0.25 * max(high - low, 1e-3)
    axes.set(
        xscale="log", xlabel="lr", ylabel="training loss", title="Range test", ylim=(low - 2 * room, high + 2 * room)
    )
    axes.legend(frameon=False, fontsize=8)
    axes.grid(color="#e4e7eb", linewidth=0.6)
