"""How a sweep stands while it runs: one live table on a terminal, now and then a plain line elsewhere.

In: results, and the metrics files that the runs write. Out: run, status, step, losses, time left. Called by `sweep`
through `cli_sweep`; rich is imported only on a terminal.
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

from bytekiln.console import human_time
from bytekiln.metrics import COLUMNS
from bytekiln.sweep.results import DONE, TrialResult

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

PLAIN_INTERVAL_S = 60.0
"""Without a terminal: at most one line a run in this time."""
MOST_ROWS = 40
"""Rows of the live table: those at work first."""


class Seen(NamedTuple):
    """What a run's metrics have told so far."""

    step: int = 0
    elapsed_s: float = 0.0
    loss: float | None = None
    val_loss: float | None = None
    best: float | None = None


class Follower:
    """Reads a metrics file as it grows, each row once."""

    def __init__(self, path: Path) -> None:
        """From its beginning."""
        self.path, self.seen = path, Seen()
        self._offset = 0
        self._inode = 0
        self._places = {name: COLUMNS.index(name) for name in ("step", "elapsed_s", "loss", "val_loss")}

    def look(self) -> Seen:
        """Take in the whole rows that are new; a file that was rewritten is read anew."""
        try:
            with self.path.open("rb") as f:
                about = self.path.stat()
                if about.st_ino != self._inode or about.st_size < self._offset:
                    self._inode, self._offset, self.seen = about.st_ino, 0, Seen()
                f.seek(self._offset)
                text = f.read()
        except OSError:
            return self.seen
        whole = text.rfind(b"\n") + 1
        self._offset += whole
        for row in csv.reader(text[:whole].decode("utf-8", "replace").splitlines()):
            self._take(row)
        return self.seen

    def _take(self, row: list[str]) -> None:
        try:
            step, elapsed, loss, val = (row[i] for i in self._places.values())
            val_loss = float(val) if val else self.seen.val_loss
            rises = self.seen.best is None or (val_loss is not None and val_loss < self.seen.best)
            best = val_loss if val and int(step) > 0 and rises else self.seen.best
            self.seen = Seen(int(step), float(elapsed), float(loss) if loss else self.seen.loss, val_loss, best)
        except (ValueError, IndexError):
            return  # the header


class ProgressBoard:
    """Shows a sweep; also the place where lines are said while the table is up."""

    def __init__(self, print_line: Callable[[str], object], *, live: bool | None = None) -> None:
        """Lines go to `print_line`; the table to the terminal on stderr, where there is one."""
        self._print = print_line
        self._live_wanted = sys.stderr.isatty() if live is None else live
        self._followers: dict[str, Follower] = {}
        self._speed: dict[str, tuple[int, float, float]] = {}
        self._said: dict[str, float] = {}
        self._live: Live | None = None
        self._console: Console | None = None

    def __enter__(self) -> Self:
        """Ready."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the table down."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, line: str) -> None:
        """One line, above the table."""
        if self._live is not None and self._console is not None:
            self._console.print(line, markup=False, highlight=False)
        else:
            self._print(line)

    def show(self, results: Sequence[TrialResult], folder: Path) -> None:
        """As `sweep.Board`."""
        running = [r for r in results if r.status == "running"]
        seen = {r.name: self._follow(r, folder) for r in running}
        left = {r.name: self.time_left(r, seen[r.name]) for r in running}
        if self._live_wanted:
            self._draw(results, seen, left)
            return
        now = time.monotonic()
        for r in running:
            if now - self._said.setdefault(r.name, now) >= PLAIN_INTERVAL_S:
                self._said[r.name] = now
                self._print(plain_line(r, seen[r.name], left[r.name], results))

    def _follow(self, r: TrialResult, folder: Path) -> Seen:
        if r.name not in self._followers:
            self._followers[r.name] = Follower(folder / r.run_dir / "metrics.csv")
        return self._followers[r.name].look()

    def time_left(self, r: TrialResult, seen: Seen) -> float | None:
        """Seconds until a run is done, by its speed since it was first looked at; None: not known yet."""
        first = self._speed.setdefault(r.name, (seen.step, seen.elapsed_s, 0.0))
        if seen.step < first[0]:
            first = self._speed[r.name] = (seen.step, seen.elapsed_s, 0.0)
        steps, seconds = seen.step - first[0], seen.elapsed_s - first[1]
        if steps <= 0:  # of a sweep that is joined late: the run's whole past
            steps, seconds = seen.step, seen.elapsed_s
        return (r.max_steps - seen.step) * seconds / steps if steps > 0 else None

    def _draw(self, results: Sequence[TrialResult], seen: dict[str, Seen], left: dict[str, float | None]) -> None:
        from rich.console import Console
        from rich.live import Live

        if self._live is None:
            self._console = Console(stderr=True)
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(table_of(results, seen, left), refresh=True)


def table_of(results: Sequence[TrialResult], seen: dict[str, Seen], left: dict[str, float | None]) -> Table:
    """The live table: runs at work, then those to come, then those that ended."""
    from rich.table import Table

    done = sum(r.status in DONE for r in results)
    waiting = [s for s in left.values() if s is not None]
    title = f"{done} of {len(results)} runs done"
    title += f", {human_time(max(waiting))} for those at work" if waiting else ""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name, justify in (("run", "left"), ("status", "left"), ("step", "right"), ("loss", "right"), ("val", "right"),
                          ("best", "right"), ("left", "right")):  # fmt: skip
        table.add_column(name, justify="right" if justify == "right" else "left", no_wrap=True)
    order = sorted(results, key=lambda r: (r.status != "running", r.status == "pending"))
    for r in order[:MOST_ROWS]:
        at = seen.get(r.name) or Seen(r.steps, 0.0, r.final_train_loss, r.final_val_loss, r.best_val_loss)
        table.add_row(
            r.name, r.status, f"{at.step:,}/{r.max_steps:,}", number(at.loss), number(at.val_loss), number(at.best),
            human_time(s) if (s := left.get(r.name)) is not None else "",
        )  # fmt: skip
    if len(order) > MOST_ROWS:
        table.add_row(f"and {len(order) - MOST_ROWS} more", "", "", "", "", "", "")
    return table


def plain_line(r: TrialResult, seen: Seen, left: float | None, results: Sequence[TrialResult]) -> str:
    """One line of a log."""
    done = sum(x.status in DONE for x in results)
    parts = [f"{r.name}: step {seen.step:,} of {r.max_steps:,}"]
    parts += [f"loss {number(seen.loss)}"] if seen.loss is not None else []
    parts += [f"validation {number(seen.val_loss)}"] if seen.val_loss is not None else []
    parts += [f"{human_time(left)} left"] if left is not None else []
    return ", ".join([*parts, f"{done} of {len(results)} runs done"])


def number(value: float | None) -> str:
    """A loss with four decimals; nothing where there is none."""
    return "" if value is None else f"{value:.4f}"
